"""Every way to choose blocks against its definition, written out block by block in fp64."""

import math
from collections.abc import Callable

import pytest
import torch

from tests.problems import SCALE, Problem, make_problem
from vllm_afbs.evaluate.baselines import (
    OracleTopK,
    OracleTopP,
    SpargeAttn,
    StreamingLLM,
    Tuned,
    UniformTau,
    VerticalSlash,
    XAttention,
)
from vllm_afbs.evaluate.baselines.spargeattn import SIMTHRESHD1
from vllm_afbs.evaluate.matching import knob_at
from vllm_afbs.evaluate.methods import Layer, Method, Selection
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.kernels.reference import reference_select

BLOCK, LENGTH = 16, 16 * 9 + 5
Kept = set[int]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(LENGTH, LENGTH, BLOCK, BLOCK, seed=3)


def layer_of(problem: Problem, index: int = 0) -> Layer:
    return Layer(index, problem.query, problem.key, SCALE)


def attention(problem: Problem, head: int) -> torch.Tensor:
    """Exact causal attention of one head, ``[length, length]``."""
    scores = problem.query[:, head].double() @ problem.key[:, head // 2].double().T * SCALE
    return torch.softmax(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf), -1)


def row_mass(problem: Problem, head: int, i: int) -> list[float]:
    rows = attention(problem, head)[i * BLOCK : (i + 1) * BLOCK]
    return [float(rows[:, j * BLOCK : (j + 1) * BLOCK].sum() / len(rows)) for j in range(i + 1)]


def largest_until(mass: list[float], tau: float, total: float = 0.0) -> Kept:
    kept: Kept = set()
    for j in sorted(range(len(mass)), key=lambda j: -mass[j]):
        if total >= tau:
            break
        kept.add(j)
        total += mass[j]
    return kept


def check(method: Method, knob: float, problem: Problem, expected: Callable[..., Kept]) -> None:
    keep = Selection(method, knob).keep(layer_of(problem))
    for head in range(keep.shape[0]):
        for i in range(keep.shape[1]):
            kept = set(keep[head, i].nonzero().flatten().tolist())
            assert kept == expected(head, i), (head, i)
    assert 0.2 < keep.sum() / (len(keep) * method.geometry(LENGTH).num_visible) < 0.95


def depth(tau: float) -> float:
    return -math.log1p(-tau)


def test_one_tau_is_the_specification(problem: Problem) -> None:
    thresholds = HeadThresholds(torch.full((4,), 0.7), torch.full((4,), THETA_OFF))
    wanted = reference_select(problem.query, problem.key, thresholds, problem.geometry, SCALE)
    method = UniformTau("", BLOCK, BLOCK)
    assert torch.equal(Selection(method, depth(0.7)).keep(layer_of(problem)), wanted)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_tuned_thresholds_are_the_specification_and_move_in_depth(
    problem: Problem, shift: float
) -> None:
    tau = torch.tensor([0.3, 0.6, 0.8, 1.0])
    theta = torch.tensor([0.2, 0.3, 0.4, 0.1])
    method = Tuned("", BLOCK, BLOCK, thresholds={2: HeadThresholds(tau, theta)})
    moved = HeadThresholds(1 - (1 - tau) * math.exp(-shift), theta)
    wanted = reference_select(problem.query, problem.key, moved, problem.geometry, SCALE)
    assert torch.equal(Selection(method, shift).keep(layer_of(problem, 2)), wanted)
    assert method.is_dense(1, LENGTH)
    assert not method.is_dense(2, LENGTH)


def test_oracle_top_k_keeps_the_blocks_of_most_mass(problem: Problem) -> None:
    def expected(head: int, i: int) -> Kept:
        mass = row_mass(problem, head, i)
        ordered = sorted(range(i + 1), key=lambda j: -mass[j])
        return set(ordered[: math.floor(0.5 * (i + 1) + 0.5)]) | {i}

    check(OracleTopK("", BLOCK, BLOCK), 0.5 + 1e-9, problem, expected)


def test_oracle_top_p_reaches_a_mass(problem: Problem) -> None:
    def expected(head: int, i: int) -> Kept:
        return largest_until(row_mass(problem, head, i), 0.8) | {0, i}

    check(OracleTopP("", BLOCK, BLOCK), depth(0.8), problem, expected)


def test_a_window_is_the_sink_and_the_nearest(problem: Problem) -> None:
    keep = Selection(StreamingLLM("", BLOCK, BLOCK), 3.5).keep(layer_of(problem))
    reach = []
    for head in keep:
        widths = [int(head[i, 1:].sum()) for i in range(5, len(head))]
        assert len(set(widths)) == 1
        reach.append(widths[0])
        for i in range(5, len(head)):
            expected = {0, *range(i - widths[0] + 1, i + 1)}
            assert set(head[i].nonzero().flatten().tolist()) == expected
    assert set(reach) == {3, 4}


@pytest.mark.parametrize("stride", [4, 8])
def test_xattention_sums_antidiagonals(problem: Problem, stride: int) -> None:
    groups = -(-LENGTH // stride)

    def padded(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(rows.double(), (0, 0, 0, groups * stride - LENGTH))

    def scores(head: int, i: int) -> list[float]:
        query, key = padded(problem.query[:, head]), padded(problem.key[:, head // 2])
        block = BLOCK // stride
        sums = torch.zeros(i + 1, dtype=torch.float64)
        for g in range(i * block, min((i + 1) * block, groups)):
            row = torch.tensor(
                [
                    sum(
                        float(query[g * stride + stride - 1 - a] @ key[h * stride + a])
                        for a in range(stride)
                    )
                    for h in range(g + 1)
                ]
            )
            weights = torch.softmax(row * SCALE / stride, 0)
            for h, weight in enumerate(weights):
                sums[h // block] += weight
        return (sums / sums.sum()).tolist()

    def expected(head: int, i: int) -> Kept:
        mass = scores(head, i)
        forced = {0, i}
        others = [0.0 if j in forced else each for j, each in enumerate(mass)]
        first = sum(mass[j] for j in forced)
        return (largest_until(others, 0.8, first) - forced) | forced

    check(XAttention("", BLOCK, BLOCK, stride=stride), depth(0.8), problem, expected)


def test_vertical_and_slash_lines_come_from_the_last_rows(problem: Problem) -> None:
    lines = {}
    for head in range(4):
        weights = attention(problem, head)[-BLOCK:]
        vertical, slash = [0.0] * 10, [0.0] * 10
        for r, row in enumerate(weights):
            for at, weight in enumerate(row.tolist()):
                vertical[at // BLOCK] += weight / BLOCK
                slash[max(0, LENGTH - BLOCK + r - at) // BLOCK] += weight / BLOCK
        lines[head] = largest_until(vertical, 0.5), largest_until(slash, 0.5)

    def expected(head: int, i: int) -> Kept:
        vertical, slash = lines[head]
        return {j for j in range(i + 1) if j in vertical or i - j in slash} | {0, i}

    check(VerticalSlash("", BLOCK, BLOCK), depth(0.5), problem, expected)


def test_spargeattn_stops_before_the_threshold_on_smoothed_keys(problem: Problem) -> None:
    # Queries must be alike for anything to be skipped.
    same = Problem(**vars(problem))
    same.query = problem.query[::BLOCK].repeat_interleave(BLOCK, 0)[:LENGTH] + problem.query / 4
    block_k = BLOCK // 2

    def alike(rows: torch.Tensor) -> bool:
        unit = rows / rows.norm(dim=1, keepdim=True)
        return bool((unit @ unit.T).mean() > SIMTHRESHD1)

    def expected(head: int, i: int) -> Kept:
        query = same.query[i * BLOCK : (i + 1) * BLOCK, head].double()
        key = problem.key[:, head // 2].double()
        blocks = (key - key.mean(0)).split(block_k)
        visible = range(min(len(blocks), 2 * (i + 1)))
        diagonal = {j for j in visible if j >= 2 * i}
        if not alike(query):
            return set(visible)
        unlike = {j for j in visible if not alike(blocks[j])}
        pooled = [j for j in visible if j not in unlike]
        scores = torch.tensor([float(query.mean(0) @ blocks[j].mean(0)) * SCALE for j in pooled])
        mass = torch.softmax(scores, 0)
        total, kept = 0.0, set()
        for j in mass.argsort(descending=True).tolist():
            total += float(mass[j])
            if kept and total > 0.8:
                break
            kept.add(pooled[j])
        return kept | unlike | diagonal

    check(SpargeAttn("", BLOCK, block_k), depth(0.8), same, expected)


@pytest.mark.parametrize(("rows", "share"), [(1, 1.0), (1, 0.0), (4, 0.5), (BLOCK, 0.5)])
def test_queries_of_any_size_may_vote_by_mean_keys_or_every_key(
    problem: Problem, rows: int, share: float
) -> None:
    def mass(head: int, query: torch.Tensor, end: int) -> torch.Tensor:
        scores = (problem.key[:end, head // 2].double() @ query * SCALE).split(BLOCK)
        by_mean = torch.softmax(torch.stack([block.mean() for block in scores]), 0)
        by_key = torch.stack([block.exp().sum() for block in scores])
        return share * by_mean + (1 - share) * by_key / by_key.sum()

    def expected(head: int, i: int) -> Kept:
        total = torch.zeros(i + 1, dtype=torch.float64)
        stop = min((i + 1) * BLOCK, LENGTH)
        for start in range(i * BLOCK, stop, rows):
            end = min(start + rows, stop)
            seen = mass(head, problem.query[start:end, head].double().mean(0), end)
            total[: len(seen)] += (end - start) * seen
        near = set(range(max(0, i - 1), i + 1))
        return largest_until((total / total.sum()).tolist(), 0.6) | {0} | near

    method = UniformTau("", BLOCK, BLOCK, query_rows=rows, mean_key_share=share, local_keys=BLOCK)
    check(method, depth(0.6), problem, expected)


def all_methods() -> list[Method]:
    return [
        OracleTopK("top k", BLOCK, BLOCK),
        OracleTopP("top p", BLOCK, BLOCK),
        StreamingLLM("window", BLOCK, BLOCK),
        XAttention("xattention", BLOCK, BLOCK),
        VerticalSlash("vertical-slash", BLOCK, BLOCK),
        UniformTau("tau", BLOCK, BLOCK, local_keys=0),
        UniformTau("small blocks", BLOCK, BLOCK // 2, local_keys=BLOCK),
    ]


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_the_knob_at_a_sparsity_leaves_it(method: Method) -> None:
    layers = [layer_of(make_problem(320, 320, BLOCK, BLOCK, seed=seed), seed) for seed in range(3)]
    visible = method.geometry(320).visible
    levels = [method.levels(layer)[:, visible] for layer in layers]
    for sparsity in (0.3, 0.5, 0.7):
        selection = Selection(method, knob_at(levels, sparsity))
        kept = sum(int(selection.keep(layer).sum()) for layer in layers)
        skipped = 1 - kept / (3 * 4 * method.geometry(320).num_visible)
        # Lines take whole diagonals and windows whole steps, of heads one by one.
        tolerance = 0.05 if isinstance(method, VerticalSlash | StreamingLLM | OracleTopK) else 0.002
        assert skipped == pytest.approx(sparsity, abs=tolerance)


def test_a_sparsity_out_of_reach_leaves_what_is_always_kept() -> None:
    layer = layer_of(make_problem(320, 320, BLOCK, BLOCK), 0)
    method = UniformTau("", BLOCK, BLOCK)
    geometry = method.geometry(320)
    knob = knob_at([method.levels(layer)[:, geometry.visible]], 0.99)
    assert torch.equal(Selection(method, knob).keep(layer)[0], geometry.always)
    assert Selection(method, math.inf).keep(layer).sum() == 4 * geometry.num_visible
