"""A layer's curves: what each head's error and sparsity are at several depths of tau.

A curve is points, as many for each head of the layer, since one pass of the evaluator scores all
heads. From the same points every tolerance is read: the points that bracket one tolerance are the
first points of the next. Between two points log error is taken for a line in depth (``depth``).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_afbs.tuning.journal import Float64, Result
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, SLOPES, START_SLOPE

CLOSE = 0.9
"""An accepted error above this share of the tolerance is not worth refining, whatever the model."""
NARROW = 0.04
"""A bracket of this depth is not worth refining: on SmolLM2-135M's slopes, error changes by less
than a twentieth within it."""
AIM = 0.5 * math.log(CLOSE)
"""Log error, over the tolerance, that readings aim at: midway between ``CLOSE`` and the tolerance.
A step that aimed at the tolerance would often land just above it and be lost."""
LEAST_ERROR = 1e-12
"""What an error counts as at least where its logarithm is taken."""


class Bracket(NamedTuple):
    """A tolerance's place between two points of each head; infinite where there is no such point.

    Every tensor is ``[num_heads]``, fp64.
    """

    low: torch.Tensor  # depth of the deepest point above the tolerance, sparser than ``high``
    low_error: torch.Tensor
    low_sparsity: torch.Tensor
    high: torch.Tensor  # depth of the sparsest point within the tolerance
    high_error: torch.Tensor
    high_sparsity: torch.Tensor


@dataclass(frozen=True, eq=False)
class Curve(Result):
    """The points of a layer's heads on one text at one length, in the order they were scored.

    Attributes:
        depths: Of each point, ``[num_heads]``.
        errors: Relative L1 there.
        sparsities: Share of the block products skipped there.
    """

    depths: tuple[Float64, ...]
    errors: tuple[Float64, ...]
    sparsities: tuple[Float64, ...]

    def sorted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Depths, errors and sparsities ``[num_points, num_heads]``, shallowest first."""
        depths, order = torch.stack(self.depths).sort(dim=0, stable=True)
        errors = torch.stack(self.errors).gather(0, order)
        return depths, errors, torch.stack(self.sparsities).gather(0, order)

    def bracket(self, tolerance: float) -> Bracket:
        """The points around a tolerance: the sparsest within it, and the one before."""
        depths, errors, sparsities = self.sorted()
        within = errors <= tolerance
        some, first = within.any(dim=0), within.int().argmax(dim=0)
        before = torch.where(some, first - 1, len(depths) - 1)
        infinite = torch.full_like(depths[0], torch.inf)

        def at(values: torch.Tensor, index: torch.Tensor, absent: torch.Tensor) -> torch.Tensor:
            known = values.gather(0, index.clamp_min(0)[None])[0]
            return torch.where(index >= 0, known, absent)

        low = [at(each, before, -infinite) for each in (depths, errors, sparsities)]
        chosen = torch.where(some, first, -1)
        high = [at(each, chosen, infinite) for each in (depths, errors, sparsities)]
        return Bracket(*low, *high)

    def measured(self, tolerance: float) -> torch.Tensor:
        """Depth of the sparsest point that was measured within a tolerance; infinite if none."""
        return self.bracket(tolerance).high

    def read(self, tolerance: float) -> torch.Tensor:
        """The depth at which a tolerance is met, read off the curve; infinite if dense only.

        It is a measured point where one lies close within the tolerance or none lies beyond, and
        otherwise lies on the line between the two points around the tolerance.
        """
        found = self.bracket(tolerance)
        below, above = found.low.isfinite(), found.high.isfinite()
        good = found.high - found.low < NARROW
        good |= (found.high_error >= CLOSE * tolerance) | ~below
        depth = torch.where(above & good, found.high, self.estimate(tolerance))
        return torch.where(depth <= MAX_DEPTH, depth, torch.inf)

    def estimate(self, tolerance: float) -> torch.Tensor:
        """Where the line between two points meets a tolerance, or the line beyond the last one."""
        found, aim, slope = self.bracket(tolerance), math.log(tolerance) + AIM, self.slope()
        lows, highs = _log(found.low_error), _log(found.high_error)
        below, above = found.low.isfinite(), found.high.isfinite()
        share = ((lows - aim) / (lows - highs)).clamp(0.0, 1.0)
        inside = found.low + (found.high - found.low) * share
        deeper, shallower = found.low + (lows - aim) / slope, found.high - (aim - highs) / slope
        outside = torch.where(below, deeper, shallower).clamp_min(MIN_DEPTH)
        return torch.where(below & above, inside, outside)

    def error_at(self, depth: torch.Tensor) -> torch.Tensor:
        """Error of each head at a depth, ``[num_heads]``; 0 where it is infinite (dense)."""
        depths, errors, _ = self.sorted()
        low, high, share = _place(depths, depth)
        low_error, high_error = (errors.gather(0, each[None])[0] for each in (low, high))
        line = _log(low_error) + share * (_log(high_error) - _log(low_error))
        beyond = torch.relu(depth - depths[-1]) - torch.relu(depths[0] - depth)
        error = torch.exp(line - self.slope() * beyond.nan_to_num(0.0, posinf=0.0))
        # At a point, the point itself: the logarithm and back would round.
        error = torch.where(depths.gather(0, low[None])[0] == depth, low_error, error)
        return torch.where(depth.isfinite(), error, 0.0)

    def sparsity_at(self, depth: torch.Tensor) -> torch.Tensor:
        """Sparsity of each head at a depth, ``[num_heads]``; 0 where it is infinite (dense).

        On the line between two points; beyond the last, what it is there.
        """
        depths, _, sparsities = self.sorted()
        low, high, share = _place(depths, depth)
        before, after = (sparsities.gather(0, each[None])[0] for each in (low, high))
        return torch.where(depth.isfinite(), before + share * (after - before), 0.0)

    def slope(self) -> torch.Tensor:
        """-d log(error) / d depth between the outermost points, ``[num_heads]``."""
        depths, errors, _ = self.sorted()
        return slope_between(depths[0], errors[0], depths[-1], errors[-1])

    def joined(self, *others: "Curve") -> "Curve":
        """The points of several curves of one text."""
        every = [self, *others]
        names = ("depths", "errors", "sparsities")
        return Curve(*(sum((getattr(each, name) for each in every), ()) for name in names))


def slope_between(
    depth: torch.Tensor, error: torch.Tensor, deeper: torch.Tensor, deeper_error: torch.Tensor
) -> torch.Tensor:
    """-d log(error) / d depth of the line between two points of each head."""
    fallen = (_log(error) - _log(deeper_error)) / (deeper - depth)
    # If no block came or went in between, no slope was learnt.
    learnt = fallen.isfinite() & (fallen != 0.0)
    return torch.where(learnt, fallen.clamp(*SLOPES), START_SLOPE)


def _log(error: torch.Tensor) -> torch.Tensor:
    return torch.log(error.clamp_min(LEAST_ERROR))


def _place(
    depths: torch.Tensor, depth: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The points before and after a depth, and how far it is on the way, in [0, 1]."""
    low = ((depths <= depth).sum(dim=0) - 1).clamp_min(0)
    high = (low + 1).clamp_max(len(depths) - 1)
    before, after = (depths.gather(0, each[None])[0] for each in (low, high))
    share = ((depth - before) / (after - before)).nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return low, high, share.clamp(0.0, 1.0)
