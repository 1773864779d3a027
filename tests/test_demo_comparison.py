"""Counters, figures and files of the demo, from answers and metrics made by hand."""

import csv
import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from rich.console import Console

from vllm_afbs.commands.client import Completion, Counters, growth, parse_counters
from vllm_afbs.demo import __main__ as demo
from vllm_afbs.demo import report
from vllm_afbs.demo.comparison import Arm, Outcome, arms, shift
from vllm_afbs.observability import fallbacks, instance, metrics


class FakeMetrics:
    """The server's metrics, written by prometheus-client itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.products = Counter(
            "vllm_afbs_block_products", "-", ["layer", "outcome"], registry=self.registry
        )
        self.attention = Histogram(
            "vllm_afbs_prefill_attention_seconds", "-", ["path"], registry=self.registry
        )
        self.selector = Histogram("vllm_afbs_selector_seconds", "-", registry=self.registry)
        self.fallbacks = Counter(
            "vllm_afbs_dense_fallbacks", "-", ["reason"], registry=self.registry
        )
        Counter("http_requests", "-", registry=self.registry).inc()

    def step(self, layer: int, computed: int, skipped: int, path: str, seconds: float) -> None:
        self.products.labels(str(layer), "computed").inc(computed)
        self.products.labels(str(layer), "skipped").inc(skipped)
        self.attention.labels(path).observe(seconds)
        self.selector.observe(seconds / 8)

    def scrape(self) -> Counters:
        return parse_counters(generate_latest(self.registry).decode())


def completion(token_ids: list[int], ttft_seconds: float = 2.0) -> Completion:
    distributions = [{token: 0.75, 90: 0.125} for token in token_ids]
    return Completion(ttft_seconds, 3.0, "text", token_ids, distributions)


@pytest.fixture
def outcomes() -> list[Outcome]:
    """Stock without metrics, and a sparse arm whose warm-up must not count."""
    metrics = FakeMetrics()
    metrics.step(layer=0, computed=1000, skipped=0, path="dense", seconds=64.0)
    before = metrics.scrape()
    metrics.step(layer=0, computed=30, skipped=10, path="sparse", seconds=0.5)
    metrics.step(layer=10, computed=20, skipped=60, path="sparse", seconds=0.25)
    metrics.fallbacks.labels("short prompt").inc(3)
    counters = growth(before, metrics.scrape())
    stock, dense, sparse = arms(Path("profile.json"))
    assert dense.profile is None
    return [
        Outcome(stock, completion([1, 2, 3, 4]), {}),
        Outcome(sparse, completion([1, 2, 7, 4], ttft_seconds=1.0), counters),
    ]


def test_only_our_own_samples_are_kept(outcomes: list[Outcome]) -> None:
    assert {name.split("_")[0] for name, _ in outcomes[1].counters} == {"vllm"}


def test_figures_count_the_request_and_not_the_warm_up(outcomes: list[Outcome]) -> None:
    sparse = outcomes[1]
    assert sparse.attention_seconds == pytest.approx(0.75)
    assert sparse.selector_seconds == pytest.approx(0.75 / 8)
    assert sparse.sparsity_by_layer == pytest.approx({0: 0.25, 10: 0.75})
    assert sparse.sparsity == pytest.approx(70 / 120)
    assert sparse.fallbacks == {"short prompt": 3}


def test_figures_are_read_from_what_our_workers_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names and labels here and in `vllm_afbs.observability.metrics` have to be the same."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "metrics"))
    metrics.count_products(layer=3, num_kept=[1], num_blocks=4)
    metrics.PREFILL_ATTENTION_SECONDS.observe(0.5, "sparse")
    metrics.SELECTOR_SECONDS.observe(0.125)
    fallbacks.count({"short_context": 2})
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path / "metrics"))
    counters = parse_counters(generate_latest(registry).decode())
    outcome = Outcome(arms(Path("profile.json"))[2], completion([1]), counters)
    assert outcome.sparsity_by_layer == {3: 0.75}
    assert (outcome.attention_seconds, outcome.selector_seconds) == (0.5, 0.125)
    assert outcome.fallbacks == {"short_context": 2}


def test_stock_server_has_no_figures_of_its_own(outcomes: list[Outcome]) -> None:
    stock = outcomes[0]
    assert stock.attention_seconds is stock.selector_seconds is stock.sparsity is None


def test_shift_looks_only_where_both_predict_from_the_same_text() -> None:
    moved = shift(completion([1, 2, 3, 4]), completion([1, 2, 7, 4]))
    assert moved.agreed_tokens == 2
    assert moved.same_top_1
    assert moved.kl_first == pytest.approx(0)
    # Only the third position differs: token 3 or 7 with 0.75, which the other does not report.
    assert moved.tv_mean == pytest.approx(0)
    different = shift(completion([5]), completion([6]))
    assert not different.same_top_1
    assert different.agreed_tokens == 0


def test_stock_arm_loads_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_AFBS_PROFILE", "of-the-caller.json")
    stock, dense, sparse = (arm.environment() for arm in arms(Path("mine.json")))
    assert stock["VLLM_PLUGINS"] == ""
    assert "VLLM_AFBS_PROFILE" not in stock.keys() | dense.keys()
    assert "VLLM_PLUGINS" not in dense
    assert sparse["VLLM_AFBS_PROFILE"] == "mine.json"


def test_files_hold_what_the_tables_show(outcomes: list[Outcome], tmp_path: Path) -> None:
    report.write(outcomes, {"prompt_tokens": 7936}, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["setup"] == {"prompt_tokens": 7936}
    assert results["servers"][1]["sparsity_by_layer"] == {"0": 0.25, "10": 0.75}
    with (tmp_path / "servers.csv").open() as file:
        stock, sparse = csv.DictReader(file)
    assert (stock["ttft_seconds"], sparse["ttft_seconds"]) == ("2.0", "1.0")
    assert (stock["sparsity"], sparse["agreed_tokens"]) == ("", "2")
    assert (tmp_path / "layers.csv").read_text().splitlines() == [
        "server,layer,sparsity",
        "sparse,0,0.25",
        "sparse,10,0.75",
    ]


def test_tables_show_speedup_sparsity_and_fallbacks(outcomes: list[Outcome]) -> None:
    console = Console(width=140, record=True, quiet=False)
    report.show(outcomes, console)
    text = console.export_text()
    assert "1.00 s (2.00x)" in text
    assert "58.3%" in text
    assert "layer 10" in text
    assert "3 x short prompt" in text


def test_profile_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "prepare", lambda: None)
    arguments = ["--profile", str(tmp_path / "none.json"), "--output-dir", str(tmp_path / "out")]
    assert demo.main(arguments) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(tmp_path / "none.json") in message


@pytest.mark.parametrize("count", ["100", "8192", "many"])
def test_prompt_of_another_length_is_refused(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--prompt-tokens", count])
    assert "--prompt-tokens" in capsys.readouterr().err


def test_arm_serves_only_what_it_says() -> None:
    arm = Arm("stock", "CPU_ATTN", plugins=False, profile=None)
    command = arm.command(Path("/models/m"))
    assert command[1:3] == ["serve", "/models/m"]
    assert command[command.index("--attention-backend") + 1] == "CPU_ATTN"
