"""The fast implementations for one request against the fp64 reference."""

import itertools
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.problems import SCALE, PagedDense, Problem, make_problem
from vllm_afbs.kernels import (
    BlockGeometry,
    HeadThresholds,
    build_tile_lists,
    build_tile_tables,
    one_head_view,
    select_blocks,
    tile_prefill,
    view_steps,
)
from vllm_afbs.kernels.reference import reference_attention, reference_varlen


def select(
    problem: Problem, implementation: Literal["reference", "torch"] = "torch"
) -> torch.Tensor:
    return select_blocks(
        problem.query, problem.key, problem.thresholds, problem.geometry, SCALE,
        implementation=implementation,
    )  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, int]:
    """Small blocks of any size, or the ones that are tuned."""
    if draw(st.booleans()):
        page_size = draw(st.sampled_from([4, 8, 16]))
        block_q = draw(st.sampled_from([8, 16, 24]))
        block_k, longest = page_size * draw(st.integers(1, 3)), 150
    else:
        block_q, block_k = draw(st.sampled_from(list(itertools.product((64, 128), repeat=2))))
        page_size, longest = draw(st.sampled_from([64, block_k])), 330
    kv_len = draw(st.integers(1, longest))
    problem = make_problem(
        draw(st.integers(1, kv_len)),
        kv_len,
        block_q,
        block_k,
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        page_size=page_size,
        seed=draw(st.integers(0, 2**16)),
    )
    return problem, page_size


@settings(max_examples=60, deadline=None)
@given(problems())
def test_selection_equals_the_reference(drawn: tuple[Problem, int]) -> None:
    problem, _ = drawn
    assert torch.equal(select(problem), select(problem, "reference"))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_tiles_equal_the_reference(drawn: tuple[Problem, int]) -> None:
    problem, page_size = drawn
    keep = select(problem)
    tables = build_tile_tables(
        build_tile_lists(keep), problem.geometry, problem.pages, page_size, problem.num_kv_heads
    )
    output = torch.empty_like(problem.query, dtype=torch.float64)
    tile_prefill(problem.query.double(), output, tables, PagedDense.of(problem, page_size))
    expected, _ = reference_attention(
        problem.query, problem.key, problem.value, keep, problem.geometry, SCALE
    )
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(problems(), st.data())
def test_selection_does_not_depend_on_aligned_chunks(
    drawn: tuple[Problem, int], data: st.DataObject
) -> None:
    problem, _ = drawn
    geometry = problem.geometry
    block_q = geometry.scored.block_q  # blocks that are scored in pairs must not be parted
    first_edge = geometry.first_row - geometry.scored.lead + block_q
    # A chunk must end between key blocks too, or the last one's self-similarity is not yet whole.
    edges = [
        edge for edge in range(first_edge, geometry.kv_len, block_q) if edge % geometry.block_k == 0
    ]
    assume(edges)
    cut = data.draw(st.sampled_from(edges))
    rows = cut - geometry.first_row
    early = Problem(
        BlockGeometry(rows, cut, geometry.block_q, geometry.block_k),
        problem.query[:rows],
        problem.key[:cut],
        problem.value[:cut],
        problem.thresholds,
        problem.pages,
    )
    whole, chunk = select(problem), select(early)
    assert torch.equal(
        whole[:, : early.geometry.num_q_blocks, : early.geometry.num_k_blocks], chunk
    )


def test_reference_without_thresholds_is_dense_attention() -> None:
    problem = make_problem(70, 100, 16, 16, num_kv_heads=2, group=2)
    thresholds = HeadThresholds(torch.ones(4), torch.full((4,), -1.0))
    output, (products,) = reference_varlen(
        problem.query, [(problem.key, problem.value)], [0, 70], thresholds, 16, 16, SCALE
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (problem.query, problem.key, problem.value)),
        attn_mask=torch.ones(70, 100).tril(30).bool(),
        scale=SCALE,
        enable_gqa=True,
    )
    torch.testing.assert_close(output.transpose(0, 1), expected, rtol=1e-10, atol=1e-10)
    assert products.sparsity == 0.0


@settings(max_examples=30, deadline=None)
@given(problems(), st.floats(-40.0, 40.0), st.sampled_from([0.0, 3.0]))
def test_reference_sinks_are_keys_without_values(
    drawn: tuple[Problem, int], sink: float, softcap: float
) -> None:
    problem, _ = drawn
    geometry, num_heads = problem.geometry, problem.query.shape[1]
    sinks = sink + torch.linspace(-1.0, 1.0, num_heads, dtype=torch.float64)
    keep = select(problem)
    output, _ = reference_attention(
        problem.query, problem.key, problem.value, keep, geometry, SCALE,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip
    kept = keep.repeat_interleave(geometry.block_k, 2)[..., : geometry.kv_len]
    kept = kept.repeat_interleave(geometry.row_starts.diff(), 1)
    causal = torch.ones(geometry.q_len, geometry.kv_len).tril(geometry.first_row).bool()
    key, value = (
        rows.double().transpose(0, 1).repeat_interleave(num_heads // problem.num_kv_heads, 0)
        for rows in (problem.key, problem.value)
    )
    scores = problem.query.double().transpose(0, 1) @ key.transpose(1, 2) * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~(kept & causal), -torch.inf)
    column = sinks[:, None, None].expand(-1, geometry.q_len, 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    torch.testing.assert_close(output.transpose(0, 1), weights @ value, rtol=1e-10, atol=1e-12)


def test_reference_lambda_skips_products_and_bounds_the_error() -> None:
    problem = make_problem(128, 128, 16, 16)
    keep = problem.geometry.visible.expand(4, -1, -1)
    arguments = (problem.query * 4, problem.key, problem.value, keep, problem.geometry, SCALE)
    dense, all_done = reference_attention(*arguments)
    lambda_ = -4.0
    output, done = reference_attention(*arguments, torch.full((4,), lambda_))
    assert done.computed < all_done.computed == all_done.dense
    # A skipped block weighs at most block_k * exp(lambda_) of the row's largest weight.
    bound = problem.geometry.num_k_blocks * 16 * torch.exp(torch.tensor(lambda_))
    assert float((output - dense).abs().max()) <= float(bound * problem.value.abs().max())


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 900), st.integers(0, 900),
    st.sampled_from([8, 16, 24, 64, 128, 256]), st.sampled_from([4, 16, 24, 64, 128]),
)  # fmt: skip
def test_what_is_always_kept_is_the_sink_and_what_is_near(
    q_len: int, before: int, block_q: int, block_k: int
) -> None:
    geometry = BlockGeometry(q_len, before + q_len, block_q, block_k)
    near = 128 if block_q >= 64 else block_q
    for i, first in enumerate(geometry.first_positions.tolist()):
        last = int(geometry.last_positions[i])
        # The row itself, and those that it and the rows after it see within reach of the first.
        wanted = {0} | {p // block_k for p in range(max(0, first - near + 1), last + 1)}
        always = geometry.always[i].nonzero().flatten().tolist()
        assert set(always) == {j for j in wanted if j * block_k <= last}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(0, 600), st.sampled_from([64, 128]))
def test_blocks_of_64_rows_are_scored_in_pairs(q_len: int, before: int, block_k: int) -> None:
    """A pair keeps the same blocks, but for those that are always kept or not seen by both."""
    problem = make_problem(q_len, before + q_len, 64, block_k, num_kv_heads=1)
    pairs = make_problem(q_len, before + q_len, 128, block_k, num_kv_heads=1)
    keep, together = select(problem), select(pairs)
    geometry, coarse = problem.geometry, pairs.geometry
    first = geometry.first_row // 128
    for i, position in enumerate(geometry.first_positions.tolist()):
        pair = position // 128 - first
        free = geometry.visible[i] & ~geometry.always[i] & ~coarse.always[pair]
        assert geometry.scored_index[i] == pair
        # The first of a pair does not see the second one's keys, whose mass goes to the others.
        if torch.equal(geometry.visible[i], coarse.visible[pair]):
            assert torch.equal(keep[:, i, free], together[:, pair, free])


def test_blocks_of_128_keep_what_earlier_profiles_were_tuned_with() -> None:
    """The first block, the diagonal one and the one before it."""
    always = BlockGeometry(1024, 1024, 128, 128).always
    for i, row in enumerate(always):
        assert set(row.nonzero().flatten().tolist()) == {0, max(0, i - 1), i}


def test_blocks_of_64_keep_64_keys_of_sink_and_128_before_the_diagonal() -> None:
    always = BlockGeometry(1024, 1024, 64, 64).always
    for i, row in enumerate(always):
        assert set(row.nonzero().flatten().tolist()) == {0, *range(max(0, i - 2), i + 1)}


def test_page_size_must_divide_the_key_block() -> None:
    problem = make_problem(16, 16, 16, 16)
    with pytest.raises(ValueError, match="page_size must divide block_k"):
        build_tile_tables(build_tile_lists(select(problem)), problem.geometry, problem.pages, 12, 2)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 4), (5, 4)])
def test_geometry_refuses_impossible_lengths(q_len: int, kv_len: int) -> None:
    with pytest.raises(ValueError, match="q_len"):
        BlockGeometry(q_len, kv_len, 4, 4)


@pytest.mark.parametrize("heads_outside", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("part_size", [8, 4, 2])
def test_a_view_of_one_head_finds_every_head_of_every_page(
    part_size: int, num_kv_heads: int, heads_outside: bool
) -> None:
    shape = (3, num_kv_heads, 8, 16) if heads_outside else (3, 8, num_kv_heads, 16)
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cache = cache.transpose(1, 2) if heads_outside else cache
    if num_kv_heads == 1:  # as a split of a wider cache, or a rank's only head, can come out
        cache = cache.as_strided(cache.shape, (128, 16, 1, 1))
    view, steps = one_head_view(cache, part_size), view_steps(cache, part_size)
    for page, head, part in itertools.product(range(3), range(num_kv_heads), range(8 // part_size)):
        index = page * steps.page + head * steps.head + part * steps.part
        keys = slice(part * part_size, (part + 1) * part_size)
        assert torch.equal(view[index, :, 0], cache[page, keys, head])
    assert index + 1 == len(view)
    # What a tensor copy takes: strides of whole rows.
    assert all(stride % 16 == 0 for stride in view.stride()[:3])
