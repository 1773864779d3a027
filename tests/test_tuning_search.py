"""The search on tau against known curves, and a layer's search against an exhaustive grid."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search_layers import captured, clustered, hidden
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.profile.schema import HeadProfile
from vllm_afbs.tuning.journal import Journal, Steps
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY, CurveSearch
from vllm_afbs.tuning.search.curve import CLOSE, Curve
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, START_SLOPE, depth_of, tau_of
from vllm_afbs.tuning.search.evaluator import HeadScores, LayerEvaluator
from vllm_afbs.tuning.search.layer import CURVE_STEPS, FACTORS, LayerSearch
from vllm_afbs.tuning.search.results import HELD_OUT_SLACK, LayerCurves
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.search.validation import Validation

TOLERANCE = 0.05
TOLERANCES = [TOLERANCE * factor for factor in FACTORS]
LAYERS = pytest.mark.parametrize("layer_of", [clustered, hidden])


def curve_of(
    score: Callable[[torch.Tensor], HeadScores], num_heads: int, start: float, steps: int
) -> tuple[Curve, CurveSearch]:
    """Searches heads from one tau."""
    depth = depth_of(torch.full((num_heads,), start, dtype=torch.float64))
    slope, most = torch.full_like(depth, START_SLOPE), torch.full_like(depth, torch.inf)
    search = CurveSearch(TOLERANCES, depth, slope, most)
    return search.run(score, steps), search


@settings(max_examples=200, deadline=None)
@given(
    scale=st.lists(st.floats(1e-3, 20.0), min_size=1, max_size=4),
    slope=st.floats(0.3, 2.0),
    bump=st.floats(0.0, 0.6),
    start=st.floats(0.1, 0.999),
)
def test_a_tau_counts_for_a_tolerance_only_if_it_was_measured_within_it(
    scale: list[float], slope: float, bump: float, start: float
) -> None:
    measured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def error_at(depth: torch.Tensor) -> torch.Tensor:
        # With a bump the error is not monotone in tau.
        return torch.tensor(scale).double() * torch.exp(
            -slope * depth + bump * torch.sin(9 * depth)
        )

    def score(tau: torch.Tensor) -> HeadScores:
        depth = depth_of(tau.double())
        measured.append((tau.clone(), error_at(depth)))
        return HeadScores(error_at(depth), torch.exp(-depth / 4))

    curve, search = curve_of(score, len(scale), start, 60)
    assert search.evaluations <= 60 * len(scale)
    depths = [curve.measured(tolerance) for tolerance in sorted(TOLERANCES)]
    for tolerance, depth in zip(sorted(TOLERANCES), depths, strict=True):
        for head in range(len(scale)):
            within = [
                float(point[head])
                for point, error in zip(curve.depths, curve.errors, strict=True)
                if error[head] <= tolerance
            ]
            assert float(depth[head]) == min(within, default=math.inf)
            # A line is met closely, unless nothing more can be dropped or it is too deep.
            met = bump == 0.0 and MIN_DEPTH < depth[head] < MAX_DEPTH
            if met and scale[head] * math.exp(-slope * MIN_DEPTH) > tolerance:
                share = CLOSE if tolerance == TOLERANCE else 0.5
                assert float(error_at(depth)[head]) >= (share - 0.05) * tolerance
    # Sparser the larger the tolerance.
    assert all((a >= b).all() for a, b in itertools.pairwise(depths))


def test_what_brackets_one_tolerance_begins_the_next() -> None:
    """On lines, five tolerances take hardly more than one point each and the first bracket."""
    generator = torch.Generator().manual_seed(0)
    num_heads = 500
    scale = torch.exp(0.5 + torch.randn(num_heads, generator=generator, dtype=torch.float64))
    slope = 0.5 + 0.7 * torch.rand(num_heads, generator=generator, dtype=torch.float64)

    def score(tau: torch.Tensor) -> HeadScores:
        depth = depth_of(tau.double())
        return HeadScores(scale * torch.exp(-slope * depth), torch.exp(-depth / 8))

    _, search = curve_of(score, num_heads, 0.93, CURVE_STEPS)
    assert search.evaluations / num_heads < len(TOLERANCES) + 2


def test_no_head_stays_dense_that_some_tau_accepts() -> None:
    """Errors fall in steps, as blocks join one by one; the line between two points misleads."""
    generator = torch.Generator().manual_seed(0)
    num_heads = 2000
    steps = torch.rand(num_heads, 12, generator=generator).mul(8.5).sort(1).values.double()
    slope = 0.2 + 1.5 * torch.rand(num_heads, 1, generator=generator)
    scale = torch.exp(1.5 + 1.4 * torch.randn(num_heads, 1, generator=generator))

    def score(tau: torch.Tensor) -> HeadScores:
        depth = depth_of(tau.double())
        reached = torch.where(steps <= depth[:, None], steps, 0.0).amax(1, keepdim=True)
        error = TOLERANCE * scale * torch.exp(-slope * reached)
        return HeadScores(error[:, 0].double(), torch.exp(-depth / 4).double())

    curve, _ = curve_of(score, num_heads, 0.93, CURVE_STEPS)
    deepest = score(tau_of(torch.full((num_heads,), MAX_DEPTH)))
    for tolerance in (TOLERANCE, 4 * TOLERANCE):
        accepted = curve.measured(tolerance).isfinite()
        assert torch.equal(accepted, deepest.error <= tolerance)


def test_a_curve_is_read_between_its_points_and_at_them() -> None:
    depths, errors = (1.0, 2.0, 3.0), (0.4, 0.1, 0.025)
    curve = Curve(
        *(tuple(torch.tensor([x], dtype=torch.float64) for x in each) for each in (depths, errors)),
        tuple(torch.tensor([x], dtype=torch.float64) for x in (0.9, 0.7, 0.3)),
    )
    # Close to a point: the point. Else on the line of log error, with the aim of 0.949.
    assert curve.read(0.1).item() == 2.0
    assert curve.read(0.109).item() == 2.0
    aim = 0.2 * math.sqrt(CLOSE)
    assert curve.read(0.2).item() == pytest.approx(2.0 - math.log(aim / 0.1) / math.log(4))
    assert curve.measured(0.2).item() == 2.0
    deeper = 3.0 + math.log(0.025 / (0.01 * math.sqrt(CLOSE))) / math.log(4)
    assert curve.read(0.01).item() == pytest.approx(deeper)
    assert curve.measured(0.01).item() == math.inf
    # Nothing is known to be sparser than the first point.
    assert curve.read(0.8).item() == 1.0
    at = torch.tensor([1.5], dtype=torch.float64)
    assert curve.error_at(at).item() == pytest.approx(0.2)
    assert curve.sparsity_at(at).item() == pytest.approx(0.8)
    assert curve.error_at(torch.tensor([2.0], dtype=torch.float64)).item() == 0.1
    dense = torch.tensor([math.inf], dtype=torch.float64)
    assert curve.error_at(dense).item() == curve.sparsity_at(dense).item() == 0.0


@settings(deadline=None)
@given(st.floats(0.01, 0.9999))
def test_depth_is_a_scale_for_tau(tau: float) -> None:
    value = torch.tensor([tau])
    torch.testing.assert_close(tau_of(depth_of(value)), value, atol=1e-6, rtol=1e-5)


def thresholds_of(heads: tuple[HeadProfile, ...]) -> HeadThresholds:
    return HeadThresholds.of(list(heads))


@LAYERS
def test_a_layers_curve_comes_close_to_an_exhaustive_grid(
    layer_of: Callable[[int, int], object], tmp_path: Path
) -> None:
    lengths, block = [256, 512, 1024], 32
    taken = captured(tmp_path, lengths[-1], layer_of)  # type: ignore[arg-type]
    job = SearchSettings(lengths, TOLERANCE, block, block, seed=1)
    journal = Journal(tmp_path / "journal.jsonl", {})
    levels = LayerSearch(job, 0, taken, journal, lambda _: None).settled(sorted(TOLERANCES))

    evaluator = LayerEvaluator(taken.load(0, "calibration"), lengths[-1], block, block)
    others = [
        LayerEvaluator(taken.load(0, window), lengths[-1], block, block, row_share=0.5)
        for window in taken.held_out
    ]
    theta = torch.full((3,), THETA_OFF)
    grid = [
        evaluator.score(HeadThresholds(torch.full((3,), tau), theta))
        for tau in tau_of(torch.linspace(0.05, 9, 72)).tolist()
    ]
    before = torch.zeros(3, dtype=torch.float64)
    for tolerance, heads in levels.items():
        found = thresholds_of(heads)
        scores = evaluator.score(found)
        sparse = found.tau < 1.0
        assert (scores.error <= tolerance).all()
        assert (scores.sparsity >= before - 1e-12).all()
        before = scores.sparsity
        best = torch.stack(
            [torch.where(each.error <= tolerance, each.sparsity, 0.0) for each in grid]
        ).amax(dim=0)
        # The grid's best need not hold on held-out text, so it is a little out of reach. Tighter
        # tolerances may end without a bracket: heads of few blocks fall in steps.
        slack = 0.06 if tolerance == TOLERANCE else 0.1
        if tolerance >= TOLERANCE:
            best = torch.where(best < MIN_SPARSITY + 0.1, 0.0, best - slack)
            assert (scores.sparsity >= best).all()
        for head, measured in enumerate(heads):
            last = measured.calibration[-1]
            assert last.sparsity == pytest.approx(float(scores.sparsity[head]), abs=1e-6)
            if sparse[head]:
                # What was read off the line is near what is measured.
                assert last.error == pytest.approx(float(scores.error[head]), abs=0.25 * tolerance)
    assert float(before.mean()) > 0.3
    assert journal.total("evaluations") <= 16 * 3

    heads = levels[TOLERANCE]
    found = thresholds_of(heads)
    exact = evaluator.score(found)
    held_out_error = torch.stack([other.score(found).error for other in others]).mean(0)
    assert (held_out_error <= HELD_OUT_SLACK * TOLERANCE).all()
    for head, measured in enumerate(heads):
        assert measured.calibration[-1].error == pytest.approx(float(exact.error[head]), abs=1e-6)
        assert measured.validation is not None
        assert measured.validation.error == pytest.approx(float(held_out_error[head]), abs=1e-6)


@LAYERS
def test_the_largest_tau_is_taken_that_skips_the_same(
    layer_of: Callable[[int, int], object], tmp_path: Path
) -> None:
    """Many taus may drop the same blocks, and the lowest of them drops more on other text."""
    taken = captured(tmp_path, 512, layer_of)  # type: ignore[arg-type]
    job = SearchSettings([256, 512], TOLERANCE, 32, 32, seed=1)
    curve = LayerSearch(job, 0, taken, Steps([], lambda _: None), lambda _: None).curves().longest
    evaluator = LayerScorer(job, 0, taken).evaluator("calibration", 512, None)
    theta = torch.full((3,), THETA_OFF)
    for depth, error, sparsity in zip(curve.depths, curve.errors, curve.sparsities, strict=True):
        scores = evaluator.score(HeadThresholds(tau_of(depth).float(), theta))
        torch.testing.assert_close(scores.error, error)
        assert torch.equal(scores.sparsity, sparsity)
        higher = evaluator.sparsity(HeadThresholds(tau_of(depth + 0.05).float(), theta))
        assert ((higher < sparsity) | (depth > MAX_DEPTH - 0.1)).all()


def accepted_at(depths: list[float]) -> Curve:
    """A curve whose points are all within the tolerance."""
    point = torch.tensor(depths, dtype=torch.float64)
    return Curve((point,), (0.9 * TOLERANCE * torch.ones(3).double(),), (0.5 * point / point,))


def test_every_text_has_to_accept_a_head(tmp_path: Path) -> None:
    job = SearchSettings([512, 1024], TOLERANCE, 32, 32, seed=1)
    scorer = LayerScorer(job, 0, captured(tmp_path, 1024, clustered, hidden))
    longest = accepted_at([1.6, 2.3, 3.0])
    held_out = Validation(job, scorer, longest).run([])
    curves = LayerCurves({512: longest, 1024: longest}, held_out, TOLERANCE, (TOLERANCE,))
    depth = curves.depth(TOLERANCE)
    tau = tau_of(depth).float()
    found = HeadThresholds(tau, torch.full_like(tau, THETA_OFF))
    one, two = (
        scorer.evaluator(window, 1024, None).score(found)
        for window in ("validation-0-0", "validation-1-0")
    )
    sparse = tau < 1.0
    assert sparse.any()
    assert (one.error != two.error).any()
    worst = torch.maximum(one.error, two.error)
    torch.testing.assert_close(held_out.error_at(depth)[sparse], worst[sparse])
    assert (worst[sparse] <= HELD_OUT_SLACK * TOLERANCE).all()
    mean = (one.sparsity + two.sparsity) / 2
    torch.testing.assert_close(held_out.sparsity_at(depth)[sparse], mean[sparse])
    assert (mean[sparse] >= MIN_SPARSITY).all()


def test_each_held_out_window_counts_as_an_evaluation(tmp_path: Path) -> None:
    job = SearchSettings([512, 1024], TOLERANCE, 32, 32, seed=1)
    counts = []
    for copies in (2, 3):
        directory = tmp_path / str(copies)
        directory.mkdir()
        scorer = LayerScorer(job, 0, captured(directory, 1024, *[clustered] * copies))
        # So near to dense that every window accepts at once.
        Validation(job, scorer, accepted_at([6.2] * 3)).run([])
        counts.append((scorer.evaluations, scorer.cost))
    assert counts[1][0] == counts[0][0] + 3
    assert counts[1][1] == pytest.approx(counts[0][1] + 3)


def test_short_lengths_cost_little_and_say_where_to_begin(tmp_path: Path) -> None:
    taken = captured(tmp_path, 1024, clustered)
    job = SearchSettings([256, 512, 1024], TOLERANCE, 32, 32, seed=1)
    steps = Steps([], lambda _: None)
    shares: list[float] = []
    LayerSearch(job, 0, taken, steps, shares.append).curves()
    assert sum(shares) == pytest.approx(1.0)
    first, second = (steps.entry(f"layer 0 explore {length}") for length in (256, 512))
    assert first.evaluations <= 2 * 3
    assert second.evaluations == 3
    assert first.cost + second.cost <= (first.evaluations / 4 + second.evaluations) / 4
    begun = steps.result("layer 0 curve", Curve).errors[0]
    assert (begun / TOLERANCE).log().abs().median() < 1.0
    assert taken.path(0, CALIBRATION).exists()
