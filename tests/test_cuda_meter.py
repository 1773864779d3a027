"""What a layer reports of its steps on CUDA, on a made-up device and on a real one."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_afbs.backends.cuda import backend, meter
from vllm_afbs.backends.cuda.card import Card
from vllm_afbs.backends.cuda.dispatch import LayerKind, dense_seconds, measurements
from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.kernels.query_blocks import PrefillRequest, cut_query_blocks
from vllm_afbs.observability import metric_files
from vllm_afbs.observability.status import Counters
from vllm_afbs.serving.batch import DenseRequests
from vllm_afbs.serving.plan import LayerPlan
from vllm_afbs.serving.settings import Settings

NUM_HEADS, HEAD_DIM, SHORT_LEN = 2, 64, 30
LONG = BlockGeometry(600, 9000, 128, 128)
PLANS = [
    LayerPlan(7, range(2, 4), None, None, ((8192, 0.8),)),
    LayerPlan(8, range(2, 4), None, "profile_dense"),
]


class MadeUpEvent:
    """A device on which every point comes a second after the one before."""

    clock_ms = 0.0

    def __init__(self, **_: Any) -> None:
        """Takes what a real one takes."""

    def record(self) -> None:
        MadeUpEvent.clock_ms += 1000.0
        self.at_ms = MadeUpEvent.clock_ms

    def elapsed_time(self, later: "MadeUpEvent") -> float:
        return later.at_ms - self.at_ms

    def synchronize(self) -> None:
        pass


class MadeUpPrefill:
    """Keeps a block of the first head and two of the second, and is a tenth off."""

    def choose(self, step: Any, num_kept: torch.Tensor) -> None:
        num_kept += torch.tensor([1, 2], device=num_kept.device)

    def attend(self, step: Any, chosen: None, output: torch.Tensor) -> None:
        for request in step.blocks.requests:
            output[request.rows] = 0.9


@pytest.fixture(autouse=True)
def dense_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """Calls of vLLM's dense attention, which is made up: the metadata and number of rows."""
    runs = []

    def forward(
        self: Any, layer: Any, query: torch.Tensor, key: Any, value: Any, kv_cache: torch.Tensor,
        metadata: Any, output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        assert query.shape == output.shape
        runs.append((metadata, len(query)))
        return output.fill_(1.0)

    monkeypatch.setattr(backend.FlashAttentionImpl, "forward", forward)
    return runs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    device = torch.device(request.param)
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "Event", MadeUpEvent)
        monkeypatch.setattr(meter, "_to_host", torch.Tensor.clone)
    return device


def make_layer(slot: int) -> Any:
    layer = object.__new__(backend.AfbsCUDAImpl)
    layer.num_heads = layer.num_kv_heads = NUM_HEADS
    layer.head_size = HEAD_DIM
    layer.kv_cache_dtype, layer.sinks = "auto", None
    layer.card = Card(90, 3)
    prefills: Any = {"tiles": MadeUpPrefill()} if PLANS[slot].dense_reason is None else {}
    layer.serve(backend.ServedLayer(PLANS[slot], slot, prefills))
    return layer


def attend(layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, **ours: Any) -> torch.Tensor:
    """Runs a step in a layer, all of whose pages are one. Rows that nothing writes are NaN."""
    block_table = torch.zeros(2, LONG.num_k_blocks, dtype=torch.int32, device=query.device)
    metadata: Any = SimpleNamespace(**{"block_table": block_table, "level": 0} | ours)
    output = torch.full_like(query, torch.nan)
    layer._attend_prefills(None, query, None, None, kv_cache, metadata, output)
    return output


def reported(count: float, num_layers: int = len(PLANS)) -> Counters:
    """The counters once the thread has reported so many layers."""
    for _ in range(500):
        counters = Counters(metric_files.read())
        counts = counters.by("vllm_afbs_prefill_attention_seconds_count", "path")
        products = counters.by("vllm_afbs_block_products_total", "layer")
        if sum(counts.values()) == count and len(products) == num_layers:
            time.sleep(0.05)  # what follows of the last one
            return Counters(metric_files.read())
        time.sleep(0.01)
    raise AssertionError("the reporting thread did not report")


def block_table(device: torch.device) -> torch.Tensor:
    """A context all of whose pages are the first one."""
    return torch.zeros(2, LONG.num_k_blocks, dtype=torch.int32, device=device)


def test_layers_report_what_the_device_did(
    device: torch.device,
    dense_runs: list[tuple[Any, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "fastest_kernel", lambda *_: "tiles")
    settings = Settings(per_head_metrics=True, sample_rate=1.0)
    the_meter = meter.DeviceMeter(PLANS, settings, device)
    layers = [make_layer(slot) for slot in range(len(PLANS))]
    # A short prompt in front; in the second step the long one is alone.
    for first_row in (SHORT_LEN, 0):
        blocks = cut_query_blocks([PrefillRequest(first_row, 1, LONG)], device)
        short_rows = torch.arange(first_row, device=device)
        short = DenseRequests(short_rows, "the short prompt's") if first_row else None
        query = torch.zeros(first_row + LONG.q_len, NUM_HEADS, HEAD_DIM, device=device)
        kv_cache = torch.zeros(1, NUM_HEADS, 128, 2 * HEAD_DIM, device=device)
        for layer in layers:
            output = attend(
                layer, query, kv_cache, blocks=blocks, meter=the_meter, dense_requests=short
            )
            assert (output[:first_row] == 1.0).all()
            assert (output[first_row:] == (0.9 if layer is layers[0] else 1.0)).all()
    short_runs = [rows for metadata, rows in dense_runs if metadata == "the short prompt's"]
    assert short_runs == [SHORT_LEN]  # the second layer runs the whole step dense

    counters = reported(4)
    num_visible = LONG.num_visible
    products = {
        (head, outcome): counters.value(
            "vllm_afbs_head_block_products_total", layer="7", head=head, outcome=outcome
        )
        for head in "23"
        for outcome in ("computed", "skipped")
    }
    assert products == {
        ("2", "computed"): 2 * 2 * 1, ("2", "skipped"): 2 * 2 * (num_visible - 1),
        ("3", "computed"): 2 * 2 * 2, ("3", "skipped"): 2 * 2 * (num_visible - 2),
    }  # fmt: skip
    name = "vllm_afbs_block_products_total"
    assert counters.value(name, layer="7", outcome="computed") == 2 * 2 * 3
    assert counters.value(name, layer="8", outcome="computed") == 2 * 2 * 2 * num_visible
    assert counters.value(name, layer="8", outcome="skipped") == 0
    tokens = "vllm_afbs_prefill_tokens_total"
    assert counters.value(tokens, path="sparse") == counters.value(tokens, path="dense") == 1200
    assert counters.value("vllm_afbs_sampled_error_count", layer="7") == 2
    assert counters.value("vllm_afbs_sampled_error_sum", layer="7") == pytest.approx(0.2, rel=1e-4)
    assert counters.value("vllm_afbs_sampled_error_count", layer="8") == 0

    num_scores = NUM_HEADS * sum(kv_len for kv_len in range(9000 - 600 + 1, 9000 + 1))
    estimate = counters.value("vllm_afbs_dense_estimate_seconds_total")
    if device.type == "cpu":
        # Twice the model's, and the second that the short prompt took beside the first.
        assert estimate == pytest.approx(
            2 * dense_seconds("sm90-fa3", LayerKind(HEAD_DIM), 9000, num_scores) + 1.0
        )
        seconds = counters.by("vllm_afbs_prefill_attention_seconds_sum", "path")
        assert seconds == {"sparse": 3.0 + 2.0, "dense": 2.0}
        assert counters.value("vllm_afbs_selector_seconds_sum") == 2.0
    else:
        assert estimate > 2 * dense_seconds("sm90-fa3", LayerKind(HEAD_DIM), 9000, num_scores)


def test_a_step_runs_at_its_own_level(
    device: torch.device,
    dense_runs: list[tuple[Any, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer that is dense at one level and sparse at the other."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "fastest_kernel", lambda *_: "tiles")
    layer = make_layer(0)
    layer.serve(backend.ServedLayer(PLANS[1], 0, {}), *layer._served)
    the_meter = meter.DeviceMeter(PLANS[:1], Settings(), device)
    blocks = cut_query_blocks([PrefillRequest(0, 1, LONG)], device)
    query = torch.zeros(LONG.q_len, NUM_HEADS, HEAD_DIM, device=device)
    kv_cache = torch.zeros(1, NUM_HEADS, 128, 2 * HEAD_DIM, device=device)
    for level, value in ((1, 0.9), (0, 1.0), (1, 0.9)):
        output = attend(
            layer, query, kv_cache, blocks=blocks, meter=the_meter, dense_requests=None, level=level
        )
        assert (output == value).all()
    counters = reported(3, num_layers=1)
    seconds = counters.by("vllm_afbs_prefill_attention_seconds_count", "path")
    assert seconds == {"sparse": 2, "dense": 1}


def test_steps_are_reported_although_the_last_layer_reports_elsewhere(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter's layer in the model's group of layers gets a builder and a meter of its own."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "fastest_kernel", lambda *_: "tiles")
    the_meter = meter.DeviceMeter(PLANS, Settings(), device)
    layer = make_layer(0)
    blocks = cut_query_blocks([PrefillRequest(0, 1, LONG)], device)
    query = torch.zeros(LONG.q_len, NUM_HEADS, HEAD_DIM, device=device)
    kv_cache = torch.zeros(1, NUM_HEADS, 128, 2 * HEAD_DIM, device=device)
    num_steps = 5
    for _ in range(num_steps):
        attend(layer, query, kv_cache, blocks=blocks, meter=the_meter, dense_requests=None)
    assert the_meter._step == []
    # The first step shows that the layer is the last; the second one's blocks go with it.
    counters = reported(num_steps - 1, num_layers=1)
    computed, skipped = (
        counters.value("vllm_afbs_block_products_total", layer="7", outcome=outcome)
        for outcome in ("computed", "skipped")
    )
    assert computed == 2 * (1 + 2) * (num_steps - 2)
    assert computed + skipped == 2 * NUM_HEADS * LONG.num_visible * (num_steps - 1)


def test_microbatches_report_to_meters_of_their_own(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``--enable-dbo`` two threads run the layers of a step's two halves in turns.

    vLLM makes a metadata builder, hence a meter, for each half.
    """
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "fastest_kernel", lambda *_: "tiles")
    layers = [make_layer(slot) for slot in range(len(PLANS))]
    blocks = cut_query_blocks([PrefillRequest(0, 1, LONG)], device)
    kv_cache = torch.zeros(1, NUM_HEADS, 128, 2 * HEAD_DIM, device=device)
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def run(half: int, the_meter: meter.DeviceMeter) -> None:
        query = torch.zeros(LONG.q_len, NUM_HEADS, HEAD_DIM, device=device)
        for _ in range(2):  # steps
            for layer in layers:
                assert turns[half].acquire(timeout=30)
                attend(layer, query, kv_cache, blocks=blocks, meter=the_meter, dense_requests=None)
                turns[1 - half].release()

    meters = [meter.DeviceMeter(PLANS, Settings(), device) for _ in turns]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, range(2), meters))
    assert all(each._step == [] for each in meters)
    counters = reported(2 * 2 * len(PLANS))
    name = "vllm_afbs_block_products_total"
    computed = {
        layer: counters.value(name, layer=layer, outcome="computed") for layer in ("7", "8")
    }
    assert computed == {"7": 2 * 2 * 2 * (1 + 2), "8": 2 * 2 * 2 * NUM_HEADS * LONG.num_visible}
    tokens = counters.by("vllm_afbs_prefill_tokens_total", "path")
    assert tokens == {"sparse": 2 * 2 * LONG.q_len, "dense": 2 * 2 * LONG.q_len}


def test_the_dense_estimate_is_the_measurement_itself_where_one_was_made() -> None:
    (row,) = (
        row for row in measurements()["sm90-fa3"].rows
        if (row.kind, row.kv_len, row.density) == (LayerKind(128), 32768, 1.0)
    )  # fmt: skip
    num_scores = row.num_heads * 32768 * 32769 // 2
    assert dense_seconds("sm90-fa3", LayerKind(128), 32768, num_scores) == pytest.approx(
        row.seconds["dense"]
    )
    assert dense_seconds("sm90-fa3", LayerKind(128), 32768, num_scores // 4) == pytest.approx(
        row.seconds["dense"] / 4
    )
