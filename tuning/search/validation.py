"""Stage 3: held-out text has the last word on each head's tau.

A head has to be accepted on every text: the largest of its errors counts. The error on a text is
the mean over the text's held-out windows, and each window has an equal part of the scored rows.

The job's tolerance is measured there, and so are the curves' ends. Error on held-out text runs
beside the calibration text's, so what lies between is read off the line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_afbs.tuning.search.bracket import score_at
from vllm_afbs.tuning.search.curve import LEAST_ERROR, Curve
from vllm_afbs.tuning.search.depth import tau_of
from vllm_afbs.tuning.search.results import HELD_OUT_SLACK, HeldOut
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.windows import by_text

HELD_OUT_Q_BLOCKS = 32
"""Query blocks of a text that are scored, spread over its windows: as many as ``CURVE_Q_BLOCKS``,
which was chosen on SmolLM2-135M, however long the context is."""
_BACK_OFFS = 4
"""Attempts to bring a head's held-out error down before it runs dense. On 135 heads of SmolLM2-135M
and three tolerances, no head backed off too far."""
_SOME_DEPTH = 6.0
"""Where a head that runs dense is scored with the others; any will do."""


@dataclass(frozen=True)
class _Point:
    """A point of every text's curve; lists are by text."""

    depth: torch.Tensor
    errors: list[torch.Tensor]
    sparsities: list[torch.Tensor]

    @property
    def error(self) -> torch.Tensor:
        """Each head's largest error of any text."""
        return torch.stack(self.errors).amax(dim=0)


class Validation:
    """Stage 3 over one layer.

    Args:
        settings: The job's settings.
        scorer: The layer's evaluators.
        longest: The calibration text's curve at the longest length.
    """

    def __init__(self, settings: SearchSettings, scorer: LayerScorer, longest: Curve) -> None:
        self._settings = settings
        self._scorer = scorer
        self._longest = longest
        self._points: list[_Point] = []

    def run(self, ends: Sequence[float]) -> HeldOut:
        """Measures every head at the job's tolerance and at the ends of the curve.

        Args:
            ends: The tolerances at the curve's ends.
        """
        for tolerance in ends:
            depth = self._longest.measured(tolerance)
            self._score(depth, depth.isfinite())
        self._settle()
        depths = tuple(point.depth for point in self._points)
        texts = range(len(self._points[0].errors))
        return HeldOut(
            tuple(
                Curve(
                    depths,
                    tuple(point.errors[text] for point in self._points),
                    tuple(point.sparsities[text] for point in self._points),
                )
                for text in texts
            )
        )

    def _settle(self) -> None:
        """Moves heads deeper until held-out text accepts them at the job's tolerance."""
        limit = HELD_OUT_SLACK * self._settings.tolerance
        depth = self._longest.measured(self._settings.tolerance)
        above = depth.isfinite()
        for attempt in range(1, _BACK_OFFS + 2):
            if not above.any():
                break
            error = self._score(depth, above).error
            above = above & (error > limit)
            # Log error falls by about as much as depth grows. Each further attempt goes farther.
            step = attempt * torch.log(error.clamp_min(LEAST_ERROR) / limit).clamp_min(0.1)
            depth = torch.where(above, depth + step, depth)

    def _score(self, depth: torch.Tensor, heads: torch.Tensor) -> _Point:
        """Scores some heads at a depth."""
        # The others stay at a depth that they were scored at, which is no further evaluation.
        known = self._points[-1].depth if self._points else torch.full_like(depth, _SOME_DEPTH)
        depth = torch.where(heads, depth, known)
        for point in self._points:
            heads = heads & (point.depth != depth)
        errors, sparsities, tau = [], [], tau_of(depth).float()
        for windows in by_text(self._scorer.held_out):
            q_blocks = HELD_OUT_Q_BLOCKS // len(windows)
            scores = []
            for window in windows:
                evaluator = self._scorer.evaluator(window, self._settings.longest, q_blocks)
                scores.append(score_at(evaluator, tau))
                self._scorer.count(evaluator, int(heads.sum()))
            errors.append(torch.stack([each.error for each in scores]).mean(dim=0))
            sparsities.append(torch.stack([each.sparsity for each in scores]).mean(dim=0))
        self._points.append(_Point(depth, errors, sparsities))
        return self._points[-1]
