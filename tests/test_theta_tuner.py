"""The tuner with theta trials: its searches on tau and theta against curves and grids."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.theta_tuner.bayes import LayerOptimizer, Observation
from benchmarks.theta_tuner.bracket import TauSearch
from benchmarks.theta_tuner.explore import HEAD_GAIN, INITIAL_THETA_TRIALS, STEPS, Explorer
from benchmarks.theta_tuner.layer import ThetaLayerSearch
from benchmarks.theta_tuner.refine import REFINE_STEPS
from benchmarks.theta_tuner.results import Attempt, Explored, Refined, Trial
from benchmarks.theta_tuner.validation import validate
from benchmarks.tuner_arms.stages import WithoutBayes
from tests.search_layers import captured, clustered, hidden
from vllm_afbs.captures import CALIBRATION, Capture, LayerTensors
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.tuning.journal import Journal, Steps
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY
from vllm_afbs.tuning.search.depth import MAX_DEPTH, START_SLOPE, depth_of, tau_of
from vllm_afbs.tuning.search.evaluator import HeadScores, LayerEvaluator
from vllm_afbs.tuning.search.results import HELD_OUT_SLACK
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

TOLERANCE = 0.05
T = TypeVar("T")


@settings(max_examples=200, deadline=None)
@given(
    scale=st.lists(st.floats(1e-3, 20.0), min_size=1, max_size=4),
    slope=st.floats(0.3, 2.0),
    bump=st.floats(0.0, 0.6),
    start=st.floats(0.1, 0.999),
)
def test_tau_search_accepts_only_what_it_measured_within_the_tolerance(
    scale: list[float], slope: float, bump: float, start: float
) -> None:
    measured: list[tuple[torch.Tensor, torch.Tensor]] = []

    def score(tau: torch.Tensor) -> HeadScores:
        depth = depth_of(tau).double()
        # With a bump the error is not monotone in tau.
        error = torch.tensor(scale).double() * torch.exp(
            -slope * depth + bump * torch.sin(9 * depth)
        )
        measured.append((tau.clone(), error))
        return HeadScores(error, torch.exp(-depth / 4))

    heads = torch.ones(len(scale), dtype=torch.bool)
    slopes = torch.full((len(scale),), START_SLOPE)
    search = TauSearch(TOLERANCE, torch.full((len(scale),), start), heads, slopes)
    best = search.run(score, max_steps=12)
    for head in range(len(scale)):
        errors = {float(tau[head]): float(error[head]) for tau, error in measured}
        accepted = [tau for tau, error in errors.items() if error <= TOLERANCE]
        if not accepted:
            assert best.tau[head] == 1.0
            assert best.sparsity[head] == 0.0
            continue
        assert errors[float(best.tau[head])] == float(best.error[head]) <= TOLERANCE
        assert float(best.tau[head]) == min(accepted)
        unbounded = bump > 0.0 or scale[head] <= TOLERANCE
        assert unbounded or float(best.error[head]) >= 0.85 * TOLERANCE


def test_tau_search_leaves_out_heads_it_is_not_asked_for() -> None:
    slopes = torch.full((2,), START_SLOPE)
    search = TauSearch(TOLERANCE, torch.tensor([0.9, 0.9]), torch.tensor([True, False]), slopes)
    best = search.run(
        lambda tau: HeadScores(0.2 * torch.exp(-depth_of(tau)).double(), 1 - tau.double()), 10
    )
    assert best.tau[1] == 1.0
    assert best.sparsity[1] == 0.0
    assert best.error[0] == pytest.approx(TOLERANCE, rel=0.1)


@settings(max_examples=200, deadline=None)
@given(
    depth=st.floats(0.1, 8.9),
    slope=st.floats(0.4, 1.6),
    start=st.floats(0.1, 0.999),
)
def test_two_steps_say_where_the_tolerance_would_be_met(
    depth: float, slope: float, start: float
) -> None:
    def log_error(tau: torch.Tensor) -> torch.Tensor:
        return -slope * (depth_of(tau).double() - depth)

    heads = torch.tensor([True, False])
    search = TauSearch(
        TOLERANCE, torch.full((2,), start), heads, torch.full((2,), START_SLOPE), nearness=0.3
    )
    search.run(lambda tau: HeadScores(TOLERANCE * log_error(tau).exp(), 1 - tau.double()), 2)
    assert search.evaluations <= 2
    estimate = search.estimate()
    assert estimate[1] == 1.0
    if depth < 8.5:
        assert abs(float(log_error(estimate)[0])) < 0.4
    if search.evaluations == 2:
        assert float(search.slope[0]) == pytest.approx(slope, rel=0.02)


def test_refining_leaves_no_head_dense_that_some_tau_accepts() -> None:
    """Errors fall in steps, as blocks join one by one; the line between two points misleads."""
    generator = torch.Generator().manual_seed(0)
    num_heads = 2000
    steps = torch.rand(num_heads, 12, generator=generator).mul(8.5).sort(1).values
    slope = 0.2 + 1.5 * torch.rand(num_heads, 1, generator=generator)
    scale = torch.exp(1.5 + 1.4 * torch.randn(num_heads, 1, generator=generator))

    def score(tau: torch.Tensor) -> HeadScores:
        depth = depth_of(tau)
        reached = torch.where(steps <= depth[:, None], steps, 0.0).amax(1, keepdim=True)
        error = TOLERANCE * scale * torch.exp(-slope * reached)
        return HeadScores(error[:, 0].double(), torch.exp(-depth / 4).double())

    start, slopes = torch.full((num_heads,), 0.93), torch.full((num_heads,), START_SLOPE)
    everyone = torch.ones(num_heads, dtype=torch.bool)
    best = TauSearch(TOLERANCE, start, everyone, slopes).run(score, REFINE_STEPS)
    deepest = score(tau_of(torch.full((num_heads,), MAX_DEPTH)))
    assert torch.equal(best.tau < 1.0, deepest.error <= TOLERANCE)


def test_a_head_beyond_every_tau_is_estimated_dense() -> None:
    search = TauSearch(
        TOLERANCE, torch.tensor([0.9]), torch.tensor([True]), torch.tensor([START_SLOPE]), 0.3
    )
    search.run(lambda tau: HeadScores(1e3 * torch.exp(-depth_of(tau)).double(), tau.double()), 2)
    assert search.estimate().tolist() == [1.0]


@pytest.mark.parametrize("layer_of", [clustered, hidden])
def test_layer_search_comes_close_to_an_exhaustive_grid(
    layer_of: Callable[[int, int], LayerTensors], tmp_path: Path
) -> None:
    lengths, block = [256, 512, 1024], 32
    taken = captured(tmp_path, lengths[-1], layer_of)
    job = SearchSettings(lengths, TOLERANCE, block, block, seed=1)
    journal = Journal(tmp_path / "journal.jsonl", {})
    heads = ThetaLayerSearch(job, 0, taken, journal, lambda _: None).run().heads

    evaluator = LayerEvaluator(taken.load(0, "calibration"), lengths[-1], block, block)
    others = [
        LayerEvaluator(taken.load(0, window), lengths[-1], block, block, row_share=0.5)
        for window in taken.held_out
    ]
    grid = torch.zeros(3, dtype=torch.float64)
    evaluations = 0
    for quantile in torch.arange(0, 0.51, 0.05).tolist():
        for tau in tau_of(torch.linspace(0.05, 9, 36)).tolist():
            scores = evaluator.score(
                HeadThresholds(torch.full((3,), tau), evaluator.theta_at(quantile))
            )
            within = scores.error <= TOLERANCE
            grid = torch.where(within, torch.maximum(grid, scores.sparsity), grid)
            evaluations += 3

    found = HeadThresholds(
        torch.tensor([head.tau for head in heads]), torch.tensor([head.theta for head in heads])
    )
    on_calibration = evaluator.score(found)
    held_out_error = torch.stack([other.score(found).error for other in others]).mean(0)
    assert (on_calibration.error <= TOLERANCE).all()
    assert (held_out_error <= HELD_OUT_SLACK * TOLERANCE).all()
    assert float(grid.mean()) > 0.3
    # The grid's best need not hold on held-out text, so it is a little out of reach.
    assert (on_calibration.sparsity >= grid - 0.06).all()
    assert journal.total("evaluations") * 15 < evaluations
    for head, measured in enumerate(heads):
        last = measured.calibration[-1]
        assert (last.error, last.sparsity) == pytest.approx(
            (float(on_calibration.error[head]), float(on_calibration.sparsity[head])), abs=1e-6
        )
        assert measured.validation is not None
        assert measured.validation.error == pytest.approx(float(held_out_error[head]), abs=1e-6)


@pytest.mark.parametrize("layer_of", [clustered, hidden])
def test_refining_takes_the_largest_tau_that_skips_the_same(
    layer_of: Callable[[int, int], LayerTensors], tmp_path: Path
) -> None:
    """Many taus may drop the same blocks, and the lowest of them drops more on other text."""
    taken = captured(tmp_path, 512, layer_of)
    job = SearchSettings([256, 512], TOLERANCE, 32, 32, seed=1)
    journal = Journal(tmp_path / "journal.jsonl", {})
    ThetaLayerSearch(job, 0, taken, journal, lambda _: None).run()
    refined = journal.result("layer 0 refine", Refined)
    theta, tau = refined.theta, refined.tau
    evaluator = LayerScorer(job, 0, taken).evaluator("calibration", 512, None)
    scores = evaluator.score(HeadThresholds(tau, theta))
    higher = evaluator.sparsity(HeadThresholds(tau_of(depth_of(tau) + 0.05), theta))
    sparse = tau < 1.0
    assert sparse.any()
    assert torch.equal(scores.sparsity[sparse], refined.sparsity[sparse])
    assert (scores.error[sparse] <= TOLERANCE).all()
    assert ((higher < scores.sparsity) | (depth_of(tau) > MAX_DEPTH - 0.1))[sparse].all()


class Misled(ThetaLayerSearch):
    """Stage 1 has read a gain from theta off a few rows, for every head."""

    def _explore(self) -> Explored:
        evaluator = self._scorer.evaluator(CALIBRATION, self._settings.longest, None)
        explored = super()._explore()
        return replace(explored, best=replace(explored.best, theta=evaluator.theta_at(0.3)))


@pytest.mark.parametrize(("layer_of", "confirmed"), [(clustered, set()), (hidden, {0, 1})])
def test_a_theta_stays_only_where_refining_confirms_its_gain(
    layer_of: Callable[[int, int], LayerTensors], confirmed: set[int], tmp_path: Path
) -> None:
    taken = captured(tmp_path, 512, layer_of)
    job = SearchSettings([256, 512], TOLERANCE, 32, 32, seed=1)
    steps = {}
    for search in (Misled, WithoutBayes):
        journal = Journal(tmp_path / f"{search.__name__}.jsonl", {})
        search(job, 0, taken, journal, lambda _: None).run()
        steps[search] = journal.result("layer 0 refine", Refined)
    found, without = steps[Misled], steps[WithoutBayes]
    for head, theta in enumerate(found.theta):
        if head in confirmed:
            assert theta > THETA_OFF
            assert found.sparsity[head] >= without.sparsity[head] + HEAD_GAIN
        else:
            for name in ("theta", "tau", "error", "sparsity"):
                assert getattr(found, name)[head] == getattr(without, name)[head]


def refined_at(tau: list[float]) -> Refined:
    """Where stage 2 could have ended, with theta off."""
    ones = torch.ones(len(tau))
    half = ones.double() / 2
    return Refined(THETA_OFF * ones, torch.tensor(tau), ones, half, error=TOLERANCE * ones.double())


def test_every_text_has_to_accept_a_head(tmp_path: Path) -> None:
    job = SearchSettings([512, 1024], TOLERANCE, 32, 32, seed=1)
    scorer = LayerScorer(job, 0, captured(tmp_path, 1024, clustered, hidden))
    heads = validate(job, scorer, refined_at([0.8, 0.9, 0.95]), (16, 32)).heads

    found = HeadThresholds(
        torch.tensor([head.tau for head in heads]), torch.tensor([head.theta for head in heads])
    )
    one, two = (
        scorer.evaluator(window, 1024, None).score(found)
        for window in ("validation-0-0", "validation-1-0")
    )
    assert any(head.tau < 1.0 for head in heads)
    assert (one.error != two.error).any()
    for index, head in enumerate(heads):
        assert head.validation is not None
        if head.tau == 1.0:
            continue
        assert head.validation.error == float(torch.maximum(one.error, two.error)[index])
        assert head.validation.error <= HELD_OUT_SLACK * TOLERANCE
        assert head.validation.sparsity == float((one.sparsity + two.sparsity)[index] / 2)
        assert head.validation.sparsity >= MIN_SPARSITY


def test_each_held_out_window_counts_as_an_evaluation(tmp_path: Path) -> None:
    job = SearchSettings([512, 1024], TOLERANCE, 32, 32, seed=1)
    counts = []
    for copies in (2, 3):
        directory = tmp_path / str(copies)
        directory.mkdir()
        scorer = LayerScorer(job, 0, captured(directory, 1024, *[clustered] * copies))
        # So near to dense that every window accepts at once.
        validate(job, scorer, refined_at([0.998] * 3), (16, 32))
        counts.append((scorer.evaluations, scorer.cost))
    assert counts[1][0] == counts[0][0] + 3
    assert counts[1][1] == pytest.approx(counts[0][1] + 3)


def explore(taken: Capture) -> tuple[Explored, Steps]:
    """Runs stage 1 at lengths 256 to 1024; returns what it chose and its steps."""
    job = SearchSettings([256, 512, 1024], TOLERANCE, 32, 32, seed=1)
    scorer = LayerScorer(job, 0, taken)
    steps = Steps([], lambda _: None)
    shares: list[float] = []

    def step(name: str, kind: type[T], compute: Callable[[], T], /) -> T:
        return steps.step(name, kind, compute, scorer)

    chosen = Explorer(job, 0, scorer, step, shares.append).run()
    assert sum(shares) == pytest.approx(1.0)
    return chosen, steps


def test_a_layer_that_gains_from_no_theta_is_left_alone(tmp_path: Path) -> None:
    chosen, steps = explore(captured(tmp_path, 1024, clustered))
    assert chosen.best.theta.tolist() == [THETA_OFF] * 3
    attempts = [entry.read(Attempt).trial for entry in steps.entries("theta")]
    assert [trial is None for trial in attempts] == [False] * INITIAL_THETA_TRIALS + [True]
    assert steps.result("target best", Attempt).trial is None
    assert steps.entry("target own").evaluations == 0
    assert all(entry.evaluations <= 3 * STEPS for entry in steps.entries(""))


def test_heads_are_scored_under_a_theta_only_if_they_could_gain(tmp_path: Path) -> None:
    taken = captured(tmp_path, 1024, clustered)
    _, steps = explore(taken)
    spared = 0
    for trial in [steps.result(f"theta {index}", Attempt).trial for index in range(2)]:
        assert trial is not None
        evaluator = LayerEvaluator(taken.load(0, "calibration"), trial.length, 32, 32)
        theta = trial.theta
        most = torch.stack(
            [
                evaluator.score(HeadThresholds(torch.full((3,), tau), theta)).sparsity
                for tau in (0.05, 0.3, 0.6, 0.9)
            ]
        ).amax(dim=0)
        for head, tau in enumerate(trial.tau):
            if tau == 1.0:
                without = float(steps.result(f"tau {trial.length}", Trial).sparsity[head])
                assert float(most[head]) < without + HEAD_GAIN
                spared += 1
    assert spared > 0


def test_a_head_whose_blocks_hide_their_mass_takes_a_theta(tmp_path: Path) -> None:
    taken = captured(tmp_path, 1024, hidden)
    chosen, steps = explore(taken)
    without, best = steps.result("tau 1024", Trial).sparsity, chosen.best
    for head in (0, 1):
        assert best.theta[head] > THETA_OFF
        assert best.sparsity[head] >= without[head] + HEAD_GAIN
    # The third head's queries are strong enough to leave the hidden blocks out: it gains hardly.
    assert without[2] <= best.sparsity[2] < without[2] + 1.5 * HEAD_GAIN
    evaluator = LayerEvaluator(taken.load(0, "calibration"), 1024, 32, 32)
    exact = evaluator.score(best.thresholds).sparsity
    torch.testing.assert_close(best.sparsity.double(), exact, atol=1e-6, rtol=0)


def test_the_optimizer_finds_an_interior_quantile_from_short_lengths() -> None:
    def value(quantile: float, length: int) -> float:
        return 0.7 - 4 * (quantile - 0.3) ** 2 - 0.1 * (1 - length / 4096)

    lengths = [1024, 2048, 4096]
    seen = [Observation(0.0, 1024, value(0.0, 1024))]
    for _ in range(2):
        quantile, length = LayerOptimizer(lengths, seen, seed=5).initial()
        seen.append(Observation(quantile, length, value(quantile, length)))
    for seed in range(5):
        point = LayerOptimizer(lengths, seen, seed).propose()
        if point is None:
            break
        seen.append(Observation(*point, value(*point)))
    assert abs(LayerOptimizer(lengths, seen, seed=0).best_quantile() - 0.3) < 0.06
    assert any(observation.length < 4096 for observation in seen)


def test_proposals_repeat_for_a_seed_and_leave_the_random_state_alone() -> None:
    seen = [Observation(0.0, 64, 0.5), Observation(0.4, 128, 0.3), Observation(0.2, 64, 0.4)]
    torch.manual_seed(0)
    with torch.inference_mode():
        first = LayerOptimizer([64, 128], seen, seed=3).propose()
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))
    assert first == LayerOptimizer([64, 128], seen, seed=3).propose()


def test_initial_points_are_new_for_every_seed() -> None:
    """Rounded to 0.01 and to a length, Sobol points can fall on one that was tried."""
    seen = [Observation(0.0, 64, 0.5), Observation(0.01, 64, 0.5)]
    tried = {(observation.quantile, observation.length) for observation in seen}
    points = [LayerOptimizer([64, 128], seen, seed).initial() for seed in range(60)]
    assert not tried & set(points)
    assert len(set(points)) > 30
