"""Workers' files against prometheus-client's own counting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client import Histogram as OwnHistogram
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests.full_disk import room_for
from tests.profiles import uniform_profile
from vllm_afbs.observability import metrics

WORKER = """
from vllm_afbs.observability import fallbacks, metrics
metrics.count_products(3, [4, 6], 20, range(2, 4))
fallbacks.count({"short_context": 2, "dense_is_faster": 0})
for seconds in (0.002, 0.02, 20.0):
    metrics.PREFILL_ATTENTION_SECONDS.observe(seconds, "sparse")
"""


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm_afbs_")
    }


def run_workers(directory: Path, variable: str) -> None:
    environment = {**os.environ, variable: str(directory)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WORKER], env=environment, check=True)


def check(shown: dict[tuple[str, tuple[tuple[str, str], ...]], float]) -> None:
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
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    metrics.publish()
    metrics.publish()
    run_workers(tmp_path, metrics.DIRECTORY_VARIABLE)
    check(samples(generate_latest(REGISTRY).decode()))


def test_a_quantile_can_be_taken_although_no_value_was_infinite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics.SAMPLED_ERROR.observe(0.03, "1")
    (family,) = metrics.read()
    bounds = {
        sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels
    }
    assert len(bounds) == len(metrics.ERROR_BUCKETS)
    assert bounds["0.02"] == 0
    assert bounds["0.03"] == bounds["+Inf"] == 1


def test_several_api_servers_read_prometheus_own_directory(tmp_path: Path) -> None:
    run_workers(tmp_path, "PROMETHEUS_MULTIPROC_DIR")
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
    (family,) = metrics.read()
    assert [sample.value for sample in family.samples] == [2.0] * 6000


def test_a_full_disk_costs_numbers_and_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics._log_once.cache_clear()
    with room_for(100_000):
        for _ in range(3):
            metrics.count_tokens("dense", 5)
        metrics.SELECTOR_SECONDS.observe(0.1)
        metrics.report_profile(None)
    assert logged == ["Metrics are not written: [Errno 27] File too large."]
    metrics.count_tokens("dense", 7)
    assert [sample.value for family in metrics.read() for sample in family.samples] == [7]


@pytest.mark.parametrize("variable", [metrics.DIRECTORY_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"])
def test_a_new_server_shows_nothing_of_those_that_ended(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (metrics.DIRECTORY_VARIABLE, metrics._STARTED_VARIABLE):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "afbs-disabled").touch()
    metrics.count_tokens("dense", 1)  # of a process that runs on
    ours = {path.name for path in tmp_path.iterdir()}
    run_workers(tmp_path, variable)
    assert len(list(tmp_path.iterdir())) == len(ours) + 2 * 2

    start = "import os; from vllm_afbs.observability import metrics; metrics.publish()"
    worker = f"{start}; metrics.publish(); metrics.count_tokens('dense', 2)"
    server = f"{start}; import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", server], check=True)
        # The one that ended last is still there: its file goes when the next one starts.
        (left,) = {path.name for path in tmp_path.iterdir()} - ours
        assert left.startswith("counter_afbs-")
    (family,) = metrics.read()
    assert [sample.value for sample in family.samples] == [1 + 2]
