"""The level between the processes of a server: all workers serve the one that was named last."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.profiles import of_levels, uniform_profile
from tests.switch_workers import workers
from tests.test_kill_switch import eventually
from vllm_afbs.backends.shared import StepSorter
from vllm_afbs.observability import instance, kill_switch, metric_files, served_level, server_file
from vllm_afbs.observability.served_level import LevelDial, Levels
from vllm_afbs.profile.errors import ProfileError


class Builder:
    """Asks for the level of its steps."""


LEVELS = Levels(("exact", "middle", "fast"), start="middle")


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "metrics"))


def shown() -> dict[str, float]:
    """The metric, by level."""
    return {
        sample.labels["level"]: sample.value
        for family in metric_files.read()
        for sample in family.samples
        if sample.name == "vllm_afbs_level"
    }


def test_all_workers_follow_and_acknowledge(tmp_path: Path) -> None:
    kill_switch.begin()
    LEVELS.begin()
    assert LEVELS.read() == "middle"
    with workers(2, LEVELS) as started:
        assert [worker.level() for worker in started] == [1, 1]
        assert served_level.count_acknowledged("middle") == 2
        assert shown() == {"exact": 0, "middle": 1, "fast": 0}

        served_level.set_level("fast")
        # The next step already: a worker does not wait for its thread to look.
        assert [worker.level() for worker in started] == [2, 2]
        assert served_level.count_acknowledged("fast") == 2
        assert served_level.count_acknowledged("middle") == 0
        assert shown() == {"exact": 0, "middle": 0, "fast": 1}

        served_level.set_level("exact")
        # Idle workers, which have no steps, acknowledge too.
        assert eventually(lambda: served_level.count_acknowledged("exact") == 2)
        assert shown() == {"exact": 1, "middle": 0, "fast": 0}
        with workers(1, LEVELS) as later:  # one that starts again serves what the others do
            assert later[0].level() == 0

        # By hand, where there are no routes.
        subprocess.run(
            f"echo fast | tee {tmp_path}/metrics/afbs-level-*", shell=True, check=True
        )  # fmt: skip
        assert started[0].level() == 2
        started[1].stop()
        assert served_level.count_acknowledged("fast") == 1  # one that ended is not counted
        # Neither file touches the other's.
        assert kill_switch.count_acknowledged(True) == 1
        assert started[0].is_enabled()


def remove_the_file(directory: Path) -> None:
    served_level.level_file().unlink()


def garble_the_file(directory: Path) -> None:
    served_level.level_file().write_bytes(b"\xff\xfe fast")


def name_none_of_the_profiles(directory: Path) -> None:
    served_level.set_level("faster\nthan light")


def remove_all(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    "damage", [remove_the_file, garble_the_file, name_none_of_the_profiles, remove_all]
)
def test_without_a_level_to_follow_the_first_one_is_served(
    damage: Callable[[Path], None], tmp_path: Path, logged: list[str]
) -> None:
    dial = LevelDial(LEVELS)
    served_level.set_level("fast")
    assert dial.look() == "fast"
    damage(tmp_path / "metrics")
    assert dial.look() == LEVELS.read() == "middle"
    assert served_level.count_acknowledged("middle") == 1
    if damage is name_none_of_the_profiles:
        (line,) = [line for line in logged if "names no level of the profile" in line]
        assert "one of exact, middle, fast expected, got " in line
        assert line.isprintable()
    LEVELS.begin()  # vLLM checks a configuration several times
    assert dial.look() == "middle"
    served_level.set_level("fast")
    assert dial.look() == LEVELS.read() == "fast"
    changes = [line for line in logged if line.startswith("Level ")]
    assert [line.split(" is served")[0] for line in changes] == [
        "Level fast", "Level middle", "Level fast",
    ]  # fmt: skip
    assert ("gone or cannot be read" in changes[1]) == (damage in (remove_the_file, remove_all))


def test_a_step_has_one_level_in_all_its_builders() -> None:
    dial, one, other = LevelDial(LEVELS), Builder(), Builder()
    served_level.set_level("fast")
    first = torch.tensor([0, 9])
    assert dial.index(first, one) == 2
    served_level.set_level("exact")
    assert dial.index(first, other) == 2
    # Another step, and one of which vLLM's object is the same.
    assert dial.index(torch.tensor([0, 9]), one) == 0
    served_level.set_level("fast")
    assert dial.index(first, one) == 2
    served_level.set_level("exact")
    assert dial.index(first, one) == 0
    assert dial.index(first, other) == 0


def config(**settings: Any) -> Any:
    return SimpleNamespace(
        lora_config=None, speculative_config=None, additional_config={"afbs": settings}
    )


PROFILE = of_levels({name: uniform_profile() for name in LEVELS.names}, default="exact")


def test_builders_sort_steps_at_the_level_and_share_a_dial() -> None:
    one, other = (StepSorter(config(level="fast"), PROFILE) for _ in range(2))
    assert one._dial is other._dial

    def level(sorter: StepSorter, starts: torch.Tensor) -> int:
        common: Any = SimpleNamespace(query_start_loc_cpu=starts, max_query_len=int(starts[-1]))
        return sorter.sort(common, starts[1:], plain_causal=True).level

    starts = torch.tensor([0, 2000])
    assert level(one, starts) == 2
    served_level.set_level("middle")
    assert level(other, starts) == 2  # the same step
    assert level(one, starts.clone()) == level(other, starts.clone()) == 1
    served_level.set_level("exact")
    assert level(one, torch.tensor([0, 1])) == 0  # a decode, which needs no level
    one.serve(None)
    assert level(one, starts.clone()) == 0


def test_levels_are_the_profiles_and_the_first_is_chosen_or_its_default() -> None:
    assert Levels.of(config(), PROFILE) == replace(LEVELS, start="exact")
    assert Levels.of(config(level="fast"), PROFILE) == replace(LEVELS, start="fast")
    message = r"^--additional-config: afbs\.level: one of exact, middle, fast expected, got 'fats'$"
    with pytest.raises(ProfileError, match=message):
        Levels.of(config(level="fats"), PROFILE)


def test_the_file_is_kept_from_cleaners_by_age(monkeypatch: pytest.MonkeyPatch) -> None:
    dial = LevelDial(LEVELS)
    file = served_level.level_file()
    os.utime(file, (1, 1))
    monkeypatch.setattr(server_file, "REFRESH_SECONDS", 0.0)
    dial.keep()
    assert time.time() - file.stat().st_mtime < 60
    file.unlink()
    dial.keep()  # and says nothing of a file that is gone
    assert not file.exists()


def test_where_the_file_cannot_be_kept_the_first_level_is_served_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "file" / "metrics"))
    dial = LevelDial(LEVELS)
    assert dial.index(object(), Builder()) == 1
    dial.keep()
    assert [line for line in logged if "The level cannot be changed while serving" in line]
    with pytest.raises(OSError, match="Not a directory"):
        served_level.set_level("fast")


def test_a_look_takes_microseconds() -> None:
    dial, builder = LevelDial(LEVELS), Builder()
    started = time.perf_counter()
    for _ in range(2000):
        dial.index(object(), builder)
    assert (time.perf_counter() - started) / 2000 < 100e-6


def test_a_container_that_starts_again_removes_what_it_left(tmp_path: Path) -> None:
    directory = tmp_path / "metrics"
    directory.mkdir()
    mine = f"{instance.host()}-{os.getpid()}-0123456789abcdef"
    (directory / f"afbs-level-{mine}").write_text("fast")
    (directory / f"afbs-served-{mine}-{instance.host()}-1").write_text("fast")
    elsewhere = directory / f"afbs-level-elsewhere-{os.getpid()}-0123456789abcdef"
    elsewhere.write_text("fast")
    LEVELS.begin()
    assert set(directory.iterdir()) == {elsewhere, served_level.level_file()}
