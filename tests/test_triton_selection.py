"""Every implementation of selection for a step, and what Triton prepares for it.

Triton's kernels run compiled on a GPU, and in Triton's interpreter without one.
"""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from tests.batches import GAP, Batch, draw_sinks, make_batch, quantise
from tests.interpreted import INTERPRETED, assert_passes_interpreted
from tests.problems import SCALE, PagedDense, relative_l1
from vllm_afbs.kernels import (
    THETA_OFF,
    HeadThresholds,
    PackedTiles,
    TileTables,
    attend_tiles,
    build_tile_lists,
    build_tile_tables,
    one_head_view,
    pool_queries,
    select_tile_lists,
    select_tiles,
)
from vllm_afbs.kernels.impl import triton_scoring
from vllm_afbs.kernels.impl.triton_packing import pack_queries, unpack_output
from vllm_afbs.kernels.reference import reference_attention, reference_select

Implementation = Literal["reference", "torch", "triton"]

ONE = [(96, 96)]
THREE = [(50, 131), (33, 300), (64, 64)]


def thresholds_of(batch: Batch, tau: float | None) -> HeadThresholds:
    drawn = batch.problems[0].thresholds
    chosen = drawn.tau if tau is None else torch.full_like(drawn.tau, tau)
    return HeadThresholds(chosen, drawn.theta)


TAUS = (None, 1.0, 1e-6)
"""The drawn ones, and the two ends."""


def without_theta(batch: Batch) -> HeadThresholds:
    drawn = batch.problems[0].thresholds
    return HeadThresholds(drawn.tau, torch.full_like(drawn.theta, THETA_OFF), has_theta=False)


def check_selection(
    batch: Batch, thresholds: HeadThresholds, implementation: Implementation = "triton"
) -> None:
    """Compares the lists and what is counted with the reference, request by request."""
    keeps = batch.in_step_order(
        [reference_select(p.query, p.key, thresholds, p.geometry, SCALE) for p in batch.problems]
    )
    num_heads, device = batch.query.shape[1], batch.query.device
    num_kept = torch.zeros(num_heads, dtype=torch.int64, device=device)
    lists = select_tile_lists(
        batch.step, thresholds.to(device), SCALE, num_kept, implementation=implementation
    )
    expected_kept = [sum(int(keep[h].sum()) for keep in keeps) for h in range(num_heads)]
    assert num_kept.tolist() == expected_kept
    counts = lists.counts.view(num_heads, -1).cpu()
    block_lists = lists.block_lists.view(num_heads, batch.blocks.num_blocks, -1).cpu()
    for keep, span in zip(keeps, batch.blocks.slices, strict=True):
        assert torch.equal(counts[:, span], keep.sum(-1, dtype=torch.int32))
        for head in range(num_heads):
            for row, kept in zip(block_lists[head, span], keep[head], strict=True):
                expected = kept.nonzero().flatten()
                assert torch.equal(row[: len(expected)].long(), expected)
    if implementation == "triton":
        num_kept.zero_()
        tiles = select_tiles(batch.step, thresholds.to(device), SCALE, num_kept)
        assert num_kept.tolist() == expected_kept
        check_tables(batch, tiles.tables, keeps)
        if device.type == "cpu":
            check_attention(batch, tiles, thresholds)
            with_sinks = replace(batch, sinks=draw_sinks(num_heads, "cpu"))
            check_attention(with_sinks, tiles, thresholds)


def check_packing(batch: Batch) -> None:
    """Packing and unpacking must be each other's inverse, and leave other rows alone."""
    packed, _ = pack_queries(batch.query, batch.blocks, batch.query.dtype)
    output = torch.zeros_like(batch.query)
    unpack_output(packed, output, batch.blocks)
    for request in batch.blocks.requests:
        assert torch.equal(output[request.rows], batch.query[request.rows])
        # torch has no ``any`` of FP8 on GPUs.
        assert not output[request.first_row - GAP : request.first_row].float().any()


def check_attention(batch: Batch, tiles: PackedTiles, thresholds: HeadThresholds) -> None:
    """Tiles on a dense kernel in fp64 must give what the reference gives, but for rounding."""
    step = batch.step
    views = (
        one_head_view(cache, step.tile_page_size)[:, :, 0]
        for cache in (step.key_cache, step.value_cache)
    )
    output = torch.full_like(step.query, torch.nan, dtype=step.matmul_dtype)
    attend_tiles(step, tiles, output, PagedDense(*views, step.tile_scales))
    for request in batch.blocks.requests:
        problem = batch.problems[request.table_row - 1]
        parts = (problem.query, problem.key, problem.value)
        keep = reference_select(*parts[:2], thresholds, problem.geometry, SCALE)
        expected, _ = reference_attention(*parts, keep, problem.geometry, SCALE, sinks=step.sinks)
        assert relative_l1(output[request.rows], expected) <= torch.finfo(output.dtype).eps
        assert output[request.first_row - GAP : request.first_row].isnan().all()


def check_tables(batch: Batch, tables: TileTables, keeps: list[torch.Tensor]) -> None:
    """The tiles' pages, through the one-head view, must hold what the plain tables' pages do."""
    num_kv_heads, page_size = batch.problems[0].num_kv_heads, batch.step.tile_page_size
    num_heads = batch.query.shape[1]
    view = one_head_view(batch.key_cache, page_size)
    # The same cache in pages of that size.
    parts = batch.key_cache.shape[1] // page_size
    key_cache = batch.key_cache.reshape(-1, page_size, *batch.key_cache.shape[2:])
    seq_lens = tables.seq_lens.view(num_heads, -1).cpu()
    block_table = tables.block_table.view(num_heads, batch.blocks.num_blocks, -1).cpu()
    starts = tables.query_start_loc.cpu()
    assert int(starts[-1]) == num_heads * batch.blocks.num_rows
    counts = batch.blocks.table[1].cpu()
    assert torch.equal(starts.diff(), counts.repeat(num_heads))
    for keep, request, span in zip(
        keeps, batch.blocks.requests, batch.blocks.slices, strict=True
    ):  # fmt: skip
        whole = batch.block_table[request.table_row].cpu()
        pages = (whole[:, None] * parts + torch.arange(parts)).flatten()
        plain = build_tile_tables(
            build_tile_lists(keep.flip(1)), request.geometry, pages, page_size, num_kv_heads
        )
        num_q_blocks = request.geometry.num_q_blocks
        plain_lens = plain.seq_lens.view(num_heads, num_q_blocks).flip(1)
        plain_pages = plain.block_table.view(num_heads, num_q_blocks, -1).flip(1)
        assert torch.equal(seq_lens[:, span], plain_lens)
        for head in range(num_heads):
            for i, own in enumerate(block_table[head, span]):
                num_pages = -(-int(plain_lens[head, i]) // page_size)
                expected = plain_pages[head, i, :num_pages].long()
                key = key_cache[expected // num_kv_heads, :, expected % num_kv_heads]
                torch.testing.assert_close(
                    view[own[:num_pages].long(), :, 0], key, rtol=0, atol=0, equal_nan=True
                )


def use_long_spans(monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Has a program score many blocks, as in large steps, or one."""
    monkeypatch.setattr(triton_scoring, "_PROGRAMS", 1 if long else 1 << 20)


def check_pooling(batch: Batch) -> None:
    _, stats = pack_queries(batch.query, batch.blocks, batch.step.matmul_dtype)
    pooled = [pool_queries(p.query, p.geometry) for p in batch.problems]
    means = torch.cat(batch.in_step_order([each.mean for each in pooled]), dim=1)
    similar = torch.cat(batch.in_step_order([each.self_similarity for each in pooled]), dim=1)
    # They are rounded to the queries' dtype, where two ways to add up may end a step apart.
    step = torch.finfo(means.dtype).eps
    torch.testing.assert_close(stats.mean.cpu(), means, rtol=step, atol=1e-5)
    torch.testing.assert_close(stats.self_similarity.cpu(), similar, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_this_module_passes_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


IMPLEMENTATIONS = [
    pytest.param(
        "triton",
        id="interpreted-triton",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="run in a process of its own, by the first test"
        ),
    ),
    "torch",
    "reference",
]
SMALL = [
    (ONE, 32, 16, False, 32), (THREE, 8, 24, True, 32), (THREE, 32, 32, False, 32),
    (ONE, 64, 16, True, 32), (THREE[:1], 16, 16, False, 16), (THREE[:1], 16, 16, False, 64),
]  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "page_size", "head_dim", "heads_outside", "block_k"), SMALL, ids=str
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_equals_the_reference(
    implementation: Implementation,
    lengths: list[tuple[int, int]],
    page_size: int,
    head_dim: int,
    heads_outside: bool,
    block_k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several programs score a request, in both directions.
    monkeypatch.setattr(triton_scoring, "_ROWS", 16)
    monkeypatch.setattr(triton_scoring, "_SPAN", 2)
    use_long_spans(monkeypatch, heads_outside)
    batch = make_batch(
        lengths, 32, page_size, head_dim, torch.float16, "cpu", heads_outside, block_k
    )
    if implementation == "triton":
        check_pooling(batch)
        check_packing(batch)
    for tau in TAUS:
        check_selection(batch, thresholds_of(batch, tau), implementation)
    check_selection(batch, without_theta(batch), implementation)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_selects_in_fp8(
    implementation: Implementation, per_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_long_spans(monkeypatch, True)
    batch = make_batch([(50, 131), (20, 20)], 32, 16, 24, torch.bfloat16, "cpu", per_head)
    quantise(batch, torch.float8_e4m3fn, True, per_head)
    if implementation == "triton":
        check_pooling(batch)
    check_selection(batch, thresholds_of(batch, None), implementation)
    check_selection(batch, without_theta(batch), implementation)


SHAPES = [(128, 64), (64, 128), (64, 64)]


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_shape_equals_the_reference(
    implementation: Implementation, shape: tuple[int, int], page_size: int
) -> None:
    """Pages may be larger than key blocks, and smaller."""
    lengths = [(150, 150), (150, 600), (1, 450)]
    block_q, block_k = shape
    batch = make_batch(lengths, block_q, page_size, 16, torch.float16, "cpu", block_k=block_k)
    check_selection(batch, thresholds_of(batch, None), implementation)
    check_selection(batch, without_theta(batch), implementation)


LARGE = [
    ([(640, 640)], 128),
    ([(300, 1000), (513, 2049), (200, 200)], 16),
    ([(513, 2049), (300, 1000)], 64),
    ([(6100, 6100)], 128),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads_outside", [False, True])
@pytest.mark.parametrize(("lengths", "page_size"), LARGE, ids=str)
def test_compiled_selection_equals_the_reference(
    lengths: list[tuple[int, int]],
    page_size: int,
    heads_outside: bool,
    head_dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_long_spans(monkeypatch, heads_outside)
    batch = make_batch(lengths, 128, page_size, head_dim, dtype, "cuda", heads_outside)
    check_pooling(batch)
    check_packing(batch)
    for tau in TAUS:
        check_selection(batch, thresholds_of(batch, tau))
    check_selection(batch, without_theta(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_selection_equals_the_reference_in_every_shape(
    shape: tuple[int, int], head_dim: int, page_size: int
) -> None:
    block_q, block_k = shape
    longest = 6100 if page_size >= 64 else 2100  # the block table has 159 columns
    for lengths in ([(300, 1000), (513, 2049), (200, 200)], [(longest, longest)]):
        batch = make_batch(
            lengths, block_q, page_size, head_dim, torch.bfloat16, "cuda", block_k=block_k
        )
        check_pooling(batch)
        check_packing(batch)
        check_selection(batch, thresholds_of(batch, None))
        check_selection(batch, without_theta(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_compiled_selection_equals_the_reference_in_fp8(head_dim: int, per_head: bool) -> None:
    batch = make_batch([(513, 2049), (300, 1000)], 128, 64, head_dim, torch.bfloat16, "cuda")
    quantise(batch, torch.float8_e4m3fn, True, per_head)
    check_pooling(batch)
    check_packing(batch)
    check_selection(batch, thresholds_of(batch, None))
    check_selection(batch, without_theta(batch))
