"""The search on tau: every head's sparsest tau within each of several tolerances, in one run.

All heads of a layer are searched at once, since one pass of the evaluator scores them all, each
head at a tau of its own. A head works on one tolerance at a time, and what it has measured brackets
the next. Until a tolerance is bracketed, steps outward follow the head's own slope and double. Then
the step is a secant on log error, or it halves the bracket if the secant creeps.

Error nearly always grows with the dropped mass, but the search does not rely on it: a tau counts
for a tolerance only if it was itself measured within it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.tuning.search.curve import (
    CLOSE,
    LEAST_ERROR,
    NARROW,
    Bracket,
    Curve,
    slope_between,
)
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, tau_of
from vllm_afbs.tuning.search.evaluator import HeadScores, LayerEvaluator

_MAX_STEP = 2.0
"""Longest step outward in depth; chosen on SmolLM2-135M. A step that is too short is doubled."""
_FIRST_REACH = 0.1
"""Shortest first step outward in depth: where error is flat in depth, the secant creeps."""
_RAISE_STEPS = 8
"""Halvings of a depth when tau is raised; each needs only a selection."""
_NEAR = 0.5
"""``CLOSE`` of all tolerances but the first: the line between points reads what is nearer. Chosen
on SmolLM2-135M: with ``CLOSE``, a head takes five more scores."""
MIN_SPARSITY = 0.1
"""Heads that would skip less run dense: selection would cost more than it saves, on any model."""


@dataclass
class CurveSearch:
    """A search in progress over the heads of one layer.

    Args:
        tolerances: Largest accepted relative L1 errors; the first is searched first.
        start: Depth to begin with, ``[num_heads]``, fp64.
        slope: -d log(error) / d depth to begin with, ``[num_heads]``; what is measured replaces it.
        most: Largest sparsity that each head can reach, ``[num_heads]``: a tolerance that allows it
            is done.
        nearness: A tolerance is also done when a log error is this close to its own, on either
            side.

    Attributes:
        evaluations: Heads scored so far.
    """

    tolerances: Sequence[float]
    start: torch.Tensor
    slope: torch.Tensor
    most: torch.Tensor
    nearness: float = 0.0
    evaluations: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._depth = self.start.clamp(MIN_DEPTH, MAX_DEPTH)
        self._target = torch.zeros(len(self.start), dtype=torch.int64)
        self._tries = torch.zeros_like(self._target)

    def run(self, score: Callable[[torch.Tensor], HeadScores], max_steps: int) -> Curve:
        """Searches until every head is done with every tolerance, or for ``max_steps`` scores.

        A head that is done is scored with the others, at the depth that it ended at.

        Args:
            score: Scores tau, ``[num_heads]``, of every head.
            max_steps: Bound on the calls of ``score``, at least one.
        """
        curve, active = Curve((), (), ()), torch.ones(len(self.start), dtype=torch.bool)
        for _ in range(max_steps):
            scores = score(tau_of(self._depth).float())
            self.evaluations += int(active.sum())
            curve = curve.joined(Curve((self._depth,), (scores.error,), (scores.sparsity,)))
            if not (active := self._move(curve)).any():
                break
        return curve

    def _move(self, curve: Curve) -> torch.Tensor:
        """Moves every head that is not done to its next depth; returns which these are."""
        slopes = self._end_slopes(curve)
        target = torch.full_like(self._target, -1)
        depth = self._depth
        for number, tolerance in enumerate(self.tolerances):
            bracket = curve.bracket(tolerance)
            now = (target < 0) & ~self._is_done(bracket, curve, tolerance)
            tries = torch.where(self._target == number, self._tries + 1, 0)
            aim = math.log(tolerance) + 0.5 * math.log(self._close(tolerance))
            depth = torch.where(now, _next(bracket, aim, slopes, tries), depth)
            self._tries = torch.where(now, tries, self._tries)
            target = torch.where(now, number, target)
        self._target, self._depth = target, depth
        return target >= 0

    def _close(self, tolerance: float) -> float:
        return CLOSE if tolerance == self.tolerances[0] else _NEAR

    def _is_done(self, bracket: Bracket, curve: Curve, tolerance: float) -> torch.Tensor:
        accepted = bracket.high.isfinite()
        close = accepted & (bracket.high_error >= self._close(tolerance) * tolerance)
        narrow = bracket.high - bracket.low < NARROW
        all_dropped = (bracket.high <= MIN_DEPTH) | (bracket.high_sparsity >= self.most)
        all_kept = ~accepted & (bracket.low >= MAX_DEPTH)
        # What is within the tolerance is deeper than a point that skips too little already.
        too_dense = bracket.low.isfinite() & (bracket.low_sparsity < MIN_SPARSITY)
        away = torch.stack(curve.errors).clamp_min(LEAST_ERROR).div(tolerance).log().abs()
        near = away.amin(dim=0) <= self.nearness
        return close | narrow | (accepted & all_dropped) | all_kept | too_dense | near

    def _end_slopes(self, curve: Curve) -> tuple[torch.Tensor, torch.Tensor]:
        """Slope at the shallowest and at the deepest point, from the point nearest to it."""
        depths, errors, _ = curve.sorted()
        count = len(depths)
        second = (depths == depths[0]).sum(dim=0).clamp_max(count - 1)
        before = (depths < depths[-1]).sum(dim=0).sub(1).clamp_min(0)
        first, last = (depths[0], errors[0]), (depths[-1], errors[-1])
        inner, outer = (
            (depths.gather(0, each[None])[0], errors.gather(0, each[None])[0])
            for each in (second, before)
        )
        alone = depths[0] == depths[-1]
        return (
            torch.where(alone, self.slope, slope_between(*first, *inner)),
            torch.where(alone, self.slope, slope_between(*outer, *last)),
        )


def _next(
    bracket: Bracket,
    aim: float,
    slopes: tuple[torch.Tensor, torch.Tensor],
    tries: torch.Tensor,
) -> torch.Tensor:
    """The next depth to score for a tolerance, whose log error to aim at is given."""
    low_error, high_error = (
        each.abs().clamp_min(LEAST_ERROR).log() for each in (bracket.low_error, bracket.high_error)
    )
    below, above = bracket.low.isfinite(), bracket.high.isfinite()
    shallower, deeper = (aim - high_error) / slopes[0], (low_error - aim) / slopes[1]
    step = torch.where(above, shallower, deeper).clamp_max(_MAX_STEP)
    step = torch.maximum(step, _FIRST_REACH * 2.0**tries)
    outside = torch.where(above, bracket.high - step, bracket.low + step)
    share = (low_error - aim) / (low_error - high_error).clamp_min(1e-6)
    # Where two secants did not suffice, every other step halves the bracket.
    creeps = (tries >= 2) & (tries % 2 == 0)
    share = torch.where(creeps, 0.5, share.clamp(0.1, 0.9))
    inside = bracket.low + (bracket.high - bracket.low) * share
    return torch.where(below & above, inside, outside.clamp(MIN_DEPTH, MAX_DEPTH))


def score_at(evaluator: LayerEvaluator, tau: torch.Tensor) -> HeadScores:
    """Error and sparsity of each head of a layer, theta off."""
    return evaluator.score(_thresholds(tau))


def sparsity_at(evaluator: LayerEvaluator, tau: torch.Tensor) -> torch.Tensor:
    """Sparsity of each head of a layer, theta off; it needs only the selection."""
    return evaluator.sparsity(_thresholds(tau))


def most_sparsity(evaluator: LayerEvaluator) -> torch.Tensor:
    """Largest sparsity that each head can reach, ``[num_heads]``."""
    return sparsity_at(evaluator, tau_of(torch.full((evaluator.num_heads,), MIN_DEPTH)))


def raised(evaluator: LayerEvaluator, depth: torch.Tensor) -> torch.Tensor:
    """The largest depth that skips the same blocks as a given one; infinite stays infinite.

    A larger tau keeps all blocks that a smaller one keeps, so equal sparsity means equal blocks.
    Many taus may drop the same blocks on this text, and the lowest of them drops more on other
    text.
    """
    skipped = sparsity_at(evaluator, tau_of(depth).float())
    low, high = depth, torch.full_like(depth, MAX_DEPTH)
    for _ in range(_RAISE_STEPS):
        middle = (low + high) / 2
        same = sparsity_at(evaluator, tau_of(middle).float()) >= skipped
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return torch.where(depth.isfinite(), torch.maximum(depth, low), depth)


def _thresholds(tau: torch.Tensor) -> HeadThresholds:
    return HeadThresholds(tau, torch.full_like(tau, THETA_OFF))
