"""Workers' files against prometheus-client's own counting."""

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
from prometheus_client import Histogram as OwnHistogram
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests import metric_workers
from tests.full_disk import room_for
from tests.profiles import uniform_profile
from vllm_afbs.observability import instance, metric_files, metrics

Key = tuple[str, tuple[tuple[str, str], ...]]
DIRECTORIES = pytest.mark.parametrize(
    "variable", [instance.DIRECTORY_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"]
)


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(metric_files._files, "retry_at", 0.0)
    metric_files.warn_once.cache_clear()


def samples(text: str) -> dict[Key, float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm_afbs_")
    }


def check(shown: dict[Key, float]) -> None:
    products = "vllm_afbs_block_products_total"
    assert shown[products, (("layer", "3"), ("outcome", "computed"))] == 2 * 2 * 10
    assert shown[products, (("layer", "3"), ("outcome", "skipped"))] == 2 * 2 * 30
    by_head = {
        (dict(labels)["head"], dict(labels)["outcome"]): value
        for (name, labels), value in shown.items()
        if name == "vllm_afbs_head_block_products_total"
    }
    assert by_head == {
        ("2", "computed"): 2 * 2 * 4, ("3", "computed"): 2 * 2 * 6,
        ("2", "skipped"): 2 * 2 * 16, ("3", "skipped"): 2 * 2 * 14,
    }  # fmt: skip
    fallbacks = {key: value for key, value in shown.items() if "fallbacks_total" in key[0]}
    assert list(fallbacks.values()) == [4]

    own = OwnHistogram(
        "vllm_afbs_prefill_attention_seconds", "", ["path"],
        buckets=metrics.SECONDS_BUCKETS, registry=(registry := CollectorRegistry()),
    )  # fmt: skip
    for seconds in 2 * (0.002, 0.02, 20.0):
        own.labels("sparse").observe(seconds)
    expected = {
        key: value
        for key, value in samples(generate_latest(registry).decode()).items()
        if not key[0].endswith("_created")
    }
    name = "vllm_afbs_prefill_attention_seconds"
    ours = {key: value for key, value in shown.items() if key[0].startswith(name)}
    assert ours == expected


def test_one_api_server_reads_the_workers_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    metrics.publish()
    metrics.publish()
    metric_workers.run(metric_workers.count, 2)
    check(samples(generate_latest(REGISTRY).decode()))


def test_a_quantile_can_be_taken_although_no_value_was_infinite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics.SAMPLED_ERROR.observe(0.03, "1")
    (family,) = metric_files.read()
    bounds = {
        sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels
    }
    assert len(bounds) == len(metrics.ERROR_BUCKETS)
    assert bounds["0.02"] == 0
    assert bounds["0.03"] == bounds["+Inf"] == 1


def test_several_api_servers_read_prometheus_own_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metric_workers.run(metric_workers.count, 2)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    check(samples(generate_latest(registry).decode()))


def test_the_profile_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    profile = uniform_profile()
    metrics.report_profile(None)
    metrics.report_profile(profile)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    shown = samples(generate_latest(registry).decode())
    assert shown["vllm_afbs_profile_loaded", ()] == 1
    (labels,) = [dict(labels) for name, labels in shown if name == "vllm_afbs_profile_info"]
    assert labels["profile_id"] == profile.profile_id
    assert labels["tolerance"] == "0.05"
    assert labels["weights"] == "unknown"


def test_room_is_taken_before_numbers_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes on a disk that fills up would end the process at the next number."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for head in range(6000):
        metrics.HEAD_BLOCK_PRODUCTS.inc(2, "0", str(head), "skipped")
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 2 << 20
    assert file.stat().st_blocks * 512 >= file.stat().st_size
    (family,) = metric_files.read()
    assert [sample.value for sample in family.samples] == [2.0] * 6000


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


def shown(registry: CollectorRegistry = REGISTRY) -> dict[Key, float]:
    return samples(generate_latest(registry).decode())


@DIRECTORIES
def test_a_new_server_shows_nothing_of_those_that_ended(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    metrics.count_tokens("dense", 1)  # of a server that runs on
    (tmp_path / "gauge_max_afbs-999999.db").touch()  # as earlier versions named them
    ours = {path.name for path in tmp_path.glob("*_afbs-*-*.db")}
    metric_workers.run(metric_workers.count, 2)
    assert len(list(tmp_path.iterdir())) == len(ours) + 1 + 2 * 2

    start = "import os; from vllm_afbs.observability import metric_files, metrics"
    count = "metrics.publish(); metrics.publish(); metrics.count_tokens('dense', 2)"
    show = "print([sample.value for each in metric_files.read() for sample in each.samples])"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", f"{start}; {count}; {show}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == "[2.0]\n"  # and nothing of the server that runs on
        # The one that ended last is still there: its file goes when the next one starts.
        (left,) = {path.name for path in tmp_path.iterdir()} - ours
        assert left.startswith("counter_afbs-")
    (family,) = metric_files.read()
    assert [sample.value for sample in family.samples] == [1]


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
