"""What a layer reports of its steps on the CPU, against fp64 and formulas."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends import cpu_attn

from tests.batches import draw_sinks
from tests.cpu_problems import HEAD_DIM, fill_cache
from tests.problems import SCALE, make_problem, relative_l1
from vllm_afbs.backends.cpu.backend import AfbsCPUImpl, AfbsCPUMetadata
from vllm_afbs.backends.cpu.meter import DenseCost, HostMeter, LayerWork
from vllm_afbs.backends.cpu.sparse import CacheFormat
from vllm_afbs.commands.client import Counters, parse_counters
from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.kernels.query_blocks import PrefillRequest
from vllm_afbs.kernels.reference import reference_attention, reference_select
from vllm_afbs.observability.error_sampling import relative_l1 as sampled_l1
from vllm_afbs.serving.batch import DenseRequests, Step
from vllm_afbs.serving.plan import LayerPlan
from vllm_afbs.serving.settings import Settings

Q_LEN, KV_LEN, SHORT_LEN, PAGE_SIZE = 640, 1000, 30, 128
LAYER, HEADS = 5, range(6, 12)
FORMAT = CacheFormat("vec", PAGE_SIZE, torch.float32)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    return tmp_path


def read(directory: Path) -> Counters:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return parse_counters(generate_latest(registry).decode())


def value(counters: Counters, name: str, **labels: Any) -> float:
    wanted = frozenset((label, str(each)) for label, each in labels.items())
    return counters.get((f"vllm_afbs_{name}", wanted), 0.0)


def make_layer(
    monkeypatch: pytest.MonkeyPatch, softcap: float, sinks: torch.Tensor | None
) -> AfbsCPUImpl:
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)
    return AfbsCPUImpl(6, HEAD_DIM, SCALE, 2, None, None, "auto", softcap, sinks=sinks)


def metadata_of(q_lens: list[int], kv_lens: list[int], pages: torch.Tensor, **ours: Any) -> Any:
    """A step's metadata; all requests read the same pages."""
    starts = torch.tensor([0, *torch.tensor(q_lens).cumsum(0)], dtype=torch.int32)
    seq_lens = torch.tensor(kv_lens, dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(q_lens), num_heads=6, num_kv_heads=2, head_dim=HEAD_DIM, seq_lens=seq_lens,
        dtype=torch.float32, query_start_loc=starts, causal=True, sliding_window_size=-1,
        isa=FORMAT.isa, enable_kv_split=True,
    )  # fmt: skip
    kind: Any = AfbsCPUMetadata if ours else cpu_attn.CPUAttentionMetadata
    return kind(
        num_actual_tokens=sum(q_lens), max_query_len=max(q_lens), query_start_loc=starts,
        max_seq_len=max(kv_lens), seq_lens=seq_lens,
        block_table=pages.to(torch.int32).expand(len(q_lens), -1).contiguous(),
        slot_mapping=torch.zeros(0), scheduler_metadata=schedule, **ours,
    )  # fmt: skip


@pytest.mark.parametrize(("softcap", "has_sinks"), [(0.0, False), (0.0, True), (5.0, True)])
def test_a_mixed_step_is_counted_and_sampled(
    softcap: float, has_sinks: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current_platform.import_kernels()
    problem = make_problem(Q_LEN, KV_LEN, 128, 128, 2, 3, HEAD_DIM, PAGE_SIZE)
    cache = fill_cache(problem, FORMAT).nan_to_num_(0.0)
    # As vLLM makes layers: a parameter, filled from the checkpoint later.
    sinks = torch.nn.Parameter(torch.zeros(6), requires_grad=False) if has_sinks else None
    impl = make_layer(monkeypatch, softcap, sinks)
    plan = LayerPlan(LAYER, HEADS, problem.thresholds, None)
    meter = HostMeter(Settings(per_head_metrics=True, sample_rate=1.0))
    impl.serve(impl.prepare(plan, FORMAT, meter))
    if sinks is not None:
        sinks.copy_(draw_sinks(6, "cpu"))

    # A short prompt in front, over the first of the same keys.
    step = Step([PrefillRequest(SHORT_LEN, 1, problem.geometry)], [0])
    step.dense_reasons["short_query"] += 1
    step = Step(step.long_prefills, step.dense_indices, step.dense_reasons, SHORT_LEN)
    short = metadata_of([SHORT_LEN], [SHORT_LEN], problem.pages)
    metadata = metadata_of(
        [SHORT_LEN, Q_LEN], [SHORT_LEN, KV_LEN], problem.pages, step=step,
        dense_requests=DenseRequests(torch.arange(SHORT_LEN), short),
    )  # fmt: skip
    query = torch.cat([torch.randn(SHORT_LEN, *problem.query.shape[1:]), problem.query])
    output = torch.full_like(query, torch.nan)
    layer = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)
    impl.forward(layer, query, query, query, cache, metadata, output)

    parts = (problem.query, problem.key, problem.value)
    keep = reference_select(*parts[:2], problem.thresholds, problem.geometry, SCALE)
    everything = problem.geometry.visible.expand(6, -1, -1)
    sparse, dense = (
        reference_attention(*parts, blocks, problem.geometry, SCALE, softcap=softcap, sinks=sinks)[
            0
        ]
        for blocks in (keep, everything)
    )
    assert relative_l1(output[SHORT_LEN:], sparse) < 1e-5
    expected_error = relative_l1(sparse, dense)
    assert expected_error > 0.01

    counters = read(directory)
    assert value(counters, "sampled_error_count", layer=LAYER) == 1
    assert value(counters, "sampled_error_sum", layer=LAYER) == pytest.approx(
        expected_error, rel=1e-4
    )
    for place, head in enumerate(HEADS):
        computed, skipped = (
            value(counters, "head_block_products_total", layer=LAYER, head=head, outcome=outcome)
            for outcome in ("computed", "skipped")
        )
        assert computed == 2 * int(keep[place].sum())
        assert computed + skipped == 2 * problem.geometry.num_visible
    for outcome in ("computed", "skipped"):
        by_head = [
            value(counters, "head_block_products_total", layer=LAYER, head=head, outcome=outcome)
            for head in HEADS
        ]
        of_layer = value(counters, "block_products_total", layer=LAYER, outcome=outcome)
        assert sum(by_head) == of_layer > 0
    assert value(counters, "prefill_tokens_total", path="sparse") == Q_LEN
    assert value(counters, "prefill_tokens_total", path="dense") == SHORT_LEN
    assert value(counters, "dense_fallbacks_total", reason="short_query") == 1
    assert value(counters, "prefill_attention_seconds_count", path="sparse") == 1
    assert value(counters, "dense_estimate_seconds_total") > 0


def made_up_work(
    num_kept: list[int], seconds: float, dense_reason: str | None = None, others: int = 0
) -> LayerWork:
    """A step of 2 heads of 3 visible blocks, and 0.25 s for the others."""
    plan = LayerPlan(LAYER, range(2), None, dense_reason)
    step = Step([PrefillRequest(0, 0, BlockGeometry(2, 2, 1, 1))], list(range(others)))
    return LayerWork(plan, step, num_kept, 1.0, 1.5, 1.5 + seconds, 1.75 + seconds)


def test_dense_time_is_estimated_from_what_was_measured(directory: Path) -> None:
    meter = HostMeter(Settings())
    estimates = []
    for work in (
        made_up_work([1, 2], 3.0, others=1),  # nothing known: 1 s a computed block, times 6
        made_up_work([], 60.0, "softcap"),  # may take another time
        made_up_work([], 60.0, "profile_dense", others=1),  # and something else
        made_up_work([2, 1], 6.0),  # 9 s for 6 computed blocks, times 6
        made_up_work([], 12.0, "profile_dense"),  # 2 s a block
        made_up_work([1, 2], 3.0),
    ):
        meter.add(work)
        estimates.append(value(read(directory), "dense_estimate_seconds_total"))
    grown = [after - before for before, after in zip([0.0, *estimates], estimates, strict=False)]
    assert grown == pytest.approx([6.25, 0, 0, 9.25, 0, 12.25])


def test_a_sample_tells_what_dense_takes(directory: Path) -> None:
    meter = HostMeter(Settings())
    work = made_up_work([1, 2], 3.0)
    reference = torch.full((2, 2, 1), 4.0)
    meter.add_sample(work.plan, work.step, torch.full_like(reference, 3.0), reference, 12.0)
    meter.add(work)  # 2 s a block, times 6, and the others
    counters = read(directory)
    assert value(counters, "dense_estimate_seconds_total") == pytest.approx(12.25)
    assert value(counters, "sampled_error_sum", layer=LAYER) == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_error_is_as_exact_over_many_rows(dtype: torch.dtype) -> None:
    q_len = 8192
    reference = torch.rand(q_len + 1, 9, HEAD_DIM).to(dtype)
    output = (reference * 0.97).to(dtype)
    output[0] = torch.nan  # another request's
    rows = [part[1:].double() for part in (output, reference)]
    request = PrefillRequest(1, 0, BlockGeometry(q_len, q_len, 128, 128))
    error = float(sampled_l1(output, reference, [request]))
    expected = float((rows[0] - rows[1]).abs().sum() / rows[1].abs().sum())
    assert error == pytest.approx(expected, rel=1e-4)


def test_a_dense_cost_beats_a_sparse_one() -> None:
    cost = DenseCost()
    cost.learn_sparse(1.0, 10)
    assert cost.estimate(100) == pytest.approx(10.0)
    cost.learn_dense(1.0, 20)
    assert cost.estimate(100) == pytest.approx(5.0)


def test_nothing_is_counted_by_head_or_sampled_unless_asked(directory: Path) -> None:
    meter = HostMeter(Settings())
    assert not any(meter.is_sampled() for _ in range(1000))
    meter.add(made_up_work([1, 2], 3.0))
    names = {name for name, _ in read(directory)}
    assert "vllm_afbs_block_products_total" in names
    assert "vllm_afbs_head_block_products_total" not in names


def test_the_sample_rate_is_a_share() -> None:
    meter = HostMeter(Settings(sample_rate=0.25))
    drawn = sum(meter.is_sampled() for _ in range(4000))
    assert 800 < drawn < 1200  # seven standard deviations either way
