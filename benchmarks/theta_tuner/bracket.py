"""Each head's largest drop that stays within the tolerance: a bracketed search on tau.

All heads of a layer are searched at once, each with its own bracket, because one pass of the
evaluator scores them all. Until a head is bracketed, steps outward follow the head's own slope and
at least double. Then the step is a secant on log error, or it halves the bracket if the secant
keeps moving the same end. This needs fewer evaluations than halving alone, and it cannot leave the
bracket.

Error nearly always grows with the dropped mass, but the search does not rely on it: a tau counts
only if it was itself measured within the tolerance, and the sparsest of these is kept. Exploring
accepts nothing yet, so there a search may stop near the tolerance on either side and estimate from
the line where it would be met.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, SLOPES, depth_of, tau_of
from vllm_afbs.tuning.search.evaluator import HeadScores, LayerEvaluator

_MAX_STEP = 2.0
"""Longest step outward in depth; chosen on SmolLM2-135M. A step that is too short is doubled."""
_FIRST_REACH = 0.1
"""Shortest first step outward in depth: where error is flat in depth, the secant creeps."""
_CLOSE = 0.9
"""An accepted error above this share of the tolerance is not worth refining, whatever the model."""
_NARROW = 0.04
"""A bracket of this depth is not worth refining: on SmolLM2-135M's slopes, error changes by less
than a twentieth within it."""
_AIM = 0.5 * math.log(_CLOSE)
"""Log error, over the tolerance, that steps aim at: midway between ``_CLOSE`` and the tolerance. A
step that aimed at the tolerance would often land just above it and be lost."""
_RAISE_STEPS = 8
"""Halvings of a depth when tau is raised; each needs only a selection."""


class AtTheta:
    """A layer at one length under a given theta per head; each head's tau is left to choose.

    Attributes:
        evaluator: The layer's, at that length.
        theta: ``[num_heads]``.
        most: Largest sparsity that each head can reach, ``[num_heads]``.
    """

    def __init__(self, evaluator: LayerEvaluator, theta: torch.Tensor) -> None:
        """Computes ``most``, which needs one selection."""
        self.evaluator = evaluator
        self.theta = theta
        self.most = self.sparsity(tau_of(torch.full_like(theta, MIN_DEPTH)))

    def score(self, tau: torch.Tensor) -> HeadScores:
        """Error and sparsity of each head."""
        return self.evaluator.score(HeadThresholds(tau, self.theta))

    def sparsity(self, tau: torch.Tensor) -> torch.Tensor:
        """Sparsity of each head; it needs only the selection."""
        return self.evaluator.sparsity(HeadThresholds(tau, self.theta))

    def raised(self, tau: torch.Tensor) -> torch.Tensor:
        """The largest tau that skips the same blocks as a given one.

        A larger tau keeps all blocks that a smaller one keeps, so equal sparsity means equal
        blocks. Many taus may drop the same blocks on this text, and the lowest of them drops more
        on other text.
        """
        skipped = self.sparsity(tau)
        low, high = depth_of(tau), torch.full_like(tau, MAX_DEPTH)
        for _ in range(_RAISE_STEPS):
            middle = (low + high) / 2
            same = self.sparsity(tau_of(middle)) >= skipped
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return torch.maximum(tau, tau_of(low))


@dataclass
class Accepted:
    """The sparsest thresholds found within the tolerance; tau 1 (dense) where there are none.

    Every attribute is ``[num_heads]``.
    """

    tau: torch.Tensor
    error: torch.Tensor
    sparsity: torch.Tensor

    @classmethod
    def dense(cls, num_heads: int) -> "Accepted":
        """No head accepted yet."""
        zeros = torch.zeros(num_heads, dtype=torch.float64)
        return cls(torch.ones(num_heads), zeros.clone(), zeros.clone())


@dataclass
class TauSearch:
    """A search in progress; one per trial.

    Args:
        tolerance: Largest accepted relative L1 error.
        start: tau to begin with, ``[num_heads]``.
        heads: Heads to search, ``[num_heads]`` bool; the others stay dense.
        slope: -d log(error) / d depth to begin with, ``[num_heads]``; replaced by what is measured.
        nearness: A head also settles when its log error is this close to the tolerance's, on either
            side.
        most: Largest sparsity that each head can reach; a head that reaches it within the tolerance
            settles.

    Attributes:
        best: What was accepted so far.
        evaluations: Heads scored so far.
    """

    tolerance: float
    start: torch.Tensor
    heads: torch.Tensor
    slope: torch.Tensor
    nearness: float = 0.0
    most: torch.Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    best: Accepted = field(init=False)
    evaluations: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        num_heads = len(self.start)
        self.best = Accepted.dense(num_heads)
        self._depth = depth_of(self.start).clamp(MIN_DEPTH, MAX_DEPTH)
        # Bracket ends and their log errors: too sparse below, accepted above.
        self._low = torch.full((num_heads,), -torch.inf)
        self._high = torch.full((num_heads,), torch.inf)
        self._low_error = torch.zeros(num_heads)
        self._high_error = torch.zeros(num_heads)
        self._last = torch.full((num_heads,), torch.nan)
        self._last_error = torch.full((num_heads,), torch.nan)
        self._slope = self.slope  # between the last two points
        self._active = self.heads.clone()
        self._reach = torch.full((num_heads,), _FIRST_REACH)
        # Whether the accepted end moved last, and whether the same end moved twice in a row.
        self._moved_high = torch.zeros(num_heads, dtype=torch.bool)
        self._stalled = torch.zeros(num_heads, dtype=torch.bool)

    def run(self, score: Callable[[torch.Tensor], HeadScores], max_steps: int) -> Accepted:
        """Searches until every head is settled, or for ``max_steps`` scores.

        Args:
            score: Scores tau, ``[num_heads]``, of every head.
            max_steps: Bound on the calls of ``score``.

        Returns:
            ``best``.
        """
        for _ in range(max_steps):
            if not self._active.any():
                break
            scores = score(tau_of(self._depth))
            self.evaluations += int(self._active.sum())
            self._update(scores)
            self._step()
        return self.best

    def estimate(self) -> torch.Tensor:
        """The tau that would meet the tolerance, ``[num_heads]``; 1 if none would.

        Read off the line between the bracket's ends, or from the nearest point by the slope.
        """
        both = self._low.isfinite() & self._high.isfinite()
        depth = torch.where(both, self._inside(), self._last + self._secant())
        depth = depth.clamp_min(MIN_DEPTH)
        return torch.where(self.heads & (depth <= MAX_DEPTH), tau_of(depth), 1.0)

    def _update(self, scores: HeadScores) -> None:
        log_error = torch.log(scores.error.clamp_min(1e-12) / self.tolerance).float()
        accepted = self._active & (scores.error <= self.tolerance)
        better = accepted & (scores.sparsity > self.best.sparsity)
        self.best.tau = torch.where(better, tau_of(self._depth), self.best.tau)
        self.best.error = torch.where(better, scores.error, self.best.error)
        self.best.sparsity = torch.where(better, scores.sparsity, self.best.sparsity)
        refused = self._active & ~accepted
        both = self._low.isfinite() & self._high.isfinite()
        self._stalled = both & (accepted == self._moved_high)
        self._moved_high = accepted
        self._high = torch.where(accepted, self._depth, self._high)
        self._high_error = torch.where(accepted, log_error, self._high_error)
        self._low = torch.where(refused, self._depth, self._low)
        self._low_error = torch.where(refused, log_error, self._low_error)

        self._learn_slope(log_error)
        near = log_error.abs() <= self.nearness
        close = accepted & (scores.error >= _CLOSE * self.tolerance)
        narrow = self._high - self._low < _NARROW
        all_dropped = accepted & ((self._depth <= MIN_DEPTH) | (scores.sparsity >= self.most))
        all_kept = refused & (self._depth >= MAX_DEPTH)
        self._active &= ~(near | close | narrow | all_dropped | all_kept)

    def _learn_slope(self, log_error: torch.Tensor) -> None:
        measured = (self._last_error - log_error) / (self._depth - self._last)
        known = self._active & measured.isfinite()
        self._slope = torch.where(known, measured.clamp(*SLOPES), self._slope)
        # If no block came or went in between, the step goes farther, but no slope was learnt.
        self.slope = torch.where(known & (measured != 0.0), self._slope, self.slope)
        self._last = torch.where(self._active, self._depth, self._last)
        self._last_error = torch.where(self._active, log_error, self._last_error)

    def _step(self) -> None:
        above, below = self._low.isfinite(), self._high.isfinite()
        secant = self._secant().abs().clamp_max(_MAX_STEP)
        step = torch.maximum(secant, self._reach)
        outside = (self._depth + torch.where(above, step, -step)).clamp(MIN_DEPTH, MAX_DEPTH)
        self._reach = self._reach * 2
        depth = torch.where(above & below, self._inside(), outside)
        self._depth = torch.where(self._active, depth, self._depth)

    def _inside(self) -> torch.Tensor:
        share = (self._low_error - _AIM) / (self._low_error - self._high_error).clamp_min(1e-6)
        share = torch.where(self._stalled, 0.5, share.clamp(0.1, 0.9))
        return self._low + (self._high - self._low) * share

    def _secant(self) -> torch.Tensor:
        return (self._last_error - _AIM) / self._slope
