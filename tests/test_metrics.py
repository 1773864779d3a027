"""Workers' files against prometheus-client's own counting."""

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client import Histogram as OwnHistogram
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests import metric_workers
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
    assert shown["vllm_afbs_layers", (("attention", "full"),)] == 2
    assert shown["vllm_afbs_layers", (("attention", "other"),)] == 0


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
