"""What happens to the metrics' files stops no server, and ``/metrics`` answers."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from tests import metric_workers
from tests.full_disk import room_for
from tests.profiles import uniform_profile
from tests.test_metrics import DIRECTORIES, shown
from vllm_afbs.observability import instance, metric_files, metrics


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(metric_files._files, "retry_at", 0.0)
    metric_files.warn_once.cache_clear()


def test_a_full_disk_costs_numbers_and_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with room_for(100_000):
        for _ in range(3):
            metrics.count_tokens("dense", 5)
        metrics.SELECTOR_SECONDS.observe(0.1)
        metrics.report_profile(None)
    (line,) = logged
    assert line.startswith(f"Metrics are not written to {tmp_path}: File too large.")
    assert not list(tmp_path.iterdir())
    metrics.count_tokens("dense", 7)  # too early: the next attempt is made in seconds
    monkeypatch.setattr(metric_files._files, "retry_at", 0.0)
    metrics.count_tokens("dense", 7)
    assert [sample.value for family in metric_files.read() for sample in family.samples] == [7]


def an_empty_file(directory: Path) -> None:
    own_file(directory).write_bytes(b"")


def a_header_alone(directory: Path) -> None:
    own_file(directory).write_bytes(b"\x10\x27\x00\x00\x00\x00\x00\x00")


def a_negative_length(directory: Path) -> None:
    """prometheus-client's own reader never ends here."""
    content = (100).to_bytes(8, "little") + (-28).to_bytes(4, "little", signed=True)
    own_file(directory).write_bytes(content + bytes(1000))


def noise(directory: Path) -> None:
    own_file(directory).write_bytes((60).to_bytes(8, "little") + random.Random(1).randbytes(500))


def no_key(directory: Path) -> None:
    key = b'["a", "b", {"le": "much"}, ""]'
    entry = len(key).to_bytes(4, "little") + key + bytes(8 - (len(key) + 4) % 8) + bytes(16)
    own_file(directory).write_bytes((8 + len(entry)).to_bytes(8, "little") + entry)


def a_directory(directory: Path) -> None:
    own_file(directory).mkdir()


def a_dangling_link(directory: Path) -> None:
    own_file(directory).symlink_to(directory / "nowhere")


def own_file(directory: Path) -> Path:
    """A place for a file that this server reads."""
    return directory / f"counter_afbs-{instance.current().server_id}-999999.db"


DAMAGES = [
    an_empty_file, a_header_alone, a_negative_length, noise, no_key, a_directory, a_dangling_link
]  # fmt: skip


@DIRECTORIES
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_costs_its_numbers_and_not_the_page(
    damage: Callable[[Path], None],
    variable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    metrics.publish()
    metrics.count_tokens("dense", 5)
    damage(tmp_path)
    # What vLLM's own /metrics shows, with one API server and with several.
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    for _ in range(2):
        assert set(shown().values()) == {5.0}
        assert set(shown(registry).values()) == {5.0}
    assert b"python_info" in generate_latest(REGISTRY)
    assert len(logged) == (damage is not a_dangling_link)
    assert all("are not shown" in line for line in logged)


@DIRECTORIES
def test_files_that_a_cleaner_removed_are_written_again(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "metrics"
    monkeypatch.setenv(variable, str(directory))
    metrics.publish()
    metrics.report_profile(uniform_profile())
    metrics.count_tokens("dense", 5)
    metrics.SELECTOR_SECONDS.observe(0.1)
    before = shown()
    assert len(before) > 5

    for path in directory.iterdir():
        path.unlink()
    metric_files.restore_files()  # as a worker's thread does twice a second
    assert shown() == before
    shutil.rmtree(directory)
    assert shown() == {}
    metrics.count_tokens("dense", 2)  # the next step comes first
    metric_files.restore_files()
    tokens = "vllm_afbs_prefill_tokens_total", (("path", "dense"),)
    assert shown() == before | {tokens: 7.0}

    directory.rename(tmp_path / "away")
    metric_files.restore_files()
    assert shown() == before | {tokens: 7.0}


def test_a_file_that_is_cut_short_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to its memory map would end the process."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics.SELECTOR_SECONDS.observe(0.1)
    (file,) = tmp_path.iterdir()
    os.truncate(file, 0)
    metrics.SELECTOR_SECONDS.observe(0.1)
    (family,) = metric_files.read()
    assert [each.value for each in family.samples if each.name.endswith("_count")] == [1]
    bounds = [each for each in family.samples if "le" in each.labels]
    assert len(bounds) == len(metrics.SECONDS_BUCKETS)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("mode", [0o700, 0o1777], ids=["private", "sticky"])
def test_leftovers_of_another_user_stop_nothing(
    mode: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own are closed to others
        directory = Path(name)
        monkeypatch.setenv(instance.DIRECTORY_VARIABLE, name)
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
        leftover = directory / "counter_afbs-999999.db"
        leftover.touch(mode=0o600)
        directory.chmod(mode)
        metric_workers.run(metric_workers.count_unprivileged)
        assert leftover.exists()
        written = [path for path in directory.iterdir() if path != leftover]
        assert len(written) == (2 if mode == 0o1777 else 0)
    # In a private directory two things fail, each said once: to look, and to write.
    lines = [line for line in capfd.readouterr().err.splitlines() if name in line]
    assert len(lines) == len(set(lines)) <= 2


def test_without_a_temporary_directory_a_server_goes_on(tmp_path: Path) -> None:
    """Its own process: it begins by naming a directory."""
    program = """
import tempfile
def none(): raise FileNotFoundError(2, "No usable temporary directory found")
tempfile.gettempdir = none
import os, pathlib
def refuse(*args, **kwargs): raise OSError(30, "Read-only file system")
pathlib.Path.mkdir = refuse
from prometheus_client import generate_latest
from vllm_afbs.observability import kill_switch, metrics
metrics.publish()
switch = kill_switch.KillSwitch()
assert not switch.is_enabled()
for _ in range(3):
    metrics.count_tokens("dense", 5)
    metrics.report_profile(None)
    switch.keep()
assert b"python_info" in generate_latest()
"""
    environment = {**os.environ}
    for variable in (instance.DIRECTORY_VARIABLE, instance._SERVER_VARIABLE):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)) == 4
    (line,) = [line for line in lines if "Metrics are not written" in line]
    assert "Read-only file system" in line


def test_failing_to_write_takes_no_time_from_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "file" / "metrics"))
    started = time.perf_counter()
    for _ in range(2000):
        metrics.count_tokens("dense", 5)
    assert (time.perf_counter() - started) / 2000 < 20e-6
