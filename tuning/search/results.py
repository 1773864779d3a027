"""What the stages of a layer's search hand on, and what the journal keeps of them."""

from dataclasses import dataclass

import torch

from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.profile.schema import HeadProfile
from vllm_afbs.tuning.journal import Result
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY
from vllm_afbs.tuning.search.curve import Curve
from vllm_afbs.tuning.search.depth import MAX_DEPTH, tau_of

HELD_OUT_SLACK = 1.2
"""Accepted held-out error, in units of the tolerance: a promise, not fitted to any model."""


@dataclass(frozen=True, eq=False)
class HeldOut(Result):
    """A layer's curves on held-out text at the longest length.

    Attributes:
        texts: A curve for each text, over all of its windows.
    """

    texts: tuple[Curve, ...]

    def error_at(self, depth: torch.Tensor) -> torch.Tensor:
        """Each head's largest error of any text, ``[num_heads]``."""
        return torch.stack([text.error_at(depth) for text in self.texts]).amax(dim=0)

    def sparsity_at(self, depth: torch.Tensor) -> torch.Tensor:
        """Each head's mean sparsity, ``[num_heads]``."""
        return torch.stack([text.sparsity_at(depth) for text in self.texts]).mean(dim=0)


@dataclass(frozen=True, eq=False)
class LayerCurves:
    """All that a layer's search has measured: what every tolerance is read off.

    Attributes:
        lengths: The calibration text's curve at each length, shortest first.
        held_out: Those of held-out text.
        tolerance: The job's: the one that every head was settled at on held-out text, too.
        searched: The tolerances that the calibration text's curve was searched for.
    """

    lengths: dict[int, Curve]
    held_out: HeldOut
    tolerance: float
    searched: tuple[float, ...]

    @property
    def longest(self) -> Curve:
        """The calibration text's at the longest length."""
        return self.lengths[max(self.lengths)]

    def depth(self, tolerance: float) -> torch.Tensor:
        """Each head's depth at a tolerance, ``[num_heads]``; infinite where it runs dense.

        Within the tolerance on the calibration text, and within ``HELD_OUT_SLACK`` times as much on
        every held-out text. At a tolerance that was searched for, the former was measured, and at
        the job's the latter, too. All else is read off the curves.
        """
        accepts = HELD_OUT_SLACK * tolerance
        was_searched, was_settled = tolerance in self.searched, tolerance == self.tolerance
        longest = self.longest
        depth = longest.measured(tolerance) if was_searched else longest.read(tolerance)
        for text in self.held_out.texts:
            deeper = text.measured(accepts) if was_settled else text.read(accepts)
            above = text.error_at(depth) > accepts
            depth = torch.where(above, torch.maximum(depth, deeper), depth)
        least = torch.minimum(self.longest.sparsity_at(depth), self.held_out.sparsity_at(depth))
        # In fp32: a tenth is 1 - 0.9, which is less than 0.1 in fp64.
        return torch.where(least.float() >= MIN_SPARSITY, depth, torch.inf)

    def thresholds(self, tolerance: float) -> HeadThresholds:
        """Each head's thresholds at a tolerance."""
        return _thresholds(self.depth(tolerance))

    def at_shortest(self) -> tuple[HeadThresholds, float]:
        """Thresholds near the job's tolerance at the shortest length, and the error they make.

        Those of the longest length would not do: they may drop nothing at a short one.

        Returns:
            The thresholds, and the mean over heads of the squared error; both off the line.
        """
        shortest = self.lengths[min(self.lengths)]
        depth = shortest.estimate(self.tolerance)
        depth = torch.where(depth <= MAX_DEPTH, depth, torch.inf)
        return _thresholds(depth), float(shortest.error_at(depth).square().mean())


@dataclass(frozen=True, eq=False)
class Settled(Result):
    """A layer's heads at one tolerance.

    Attributes:
        heads: Their entries in the profile.
    """

    heads: tuple[HeadProfile, ...]


def _thresholds(depth: torch.Tensor) -> HeadThresholds:
    tau = tau_of(depth).float()
    return HeadThresholds(tau, torch.full_like(tau, THETA_OFF))
