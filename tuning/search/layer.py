"""The search over one layer: explore short contexts, draw curves at the longest, validate.

1. *Explore* (``explore``): each head's tau on the shorter lengths, roughly.
2. *Curves* (``bracket``): at the longest length and with more query rows, the sparsest tau that was
   measured within each of a few tolerances around the job's. All of them share their points.
3. *Validate* (``validation``): the job's tolerance and the curves' ends are measured on held-out
   text. A head whose error there is above 1.2 x the tolerance backs off, at last to dense.

What a level of the profile needs is then read off the curves (``results.LayerCurves``), and only
its sparsities are computed, which takes selections and no attention (``LayerSearch.settled``).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.kernels import THETA_OFF
from vllm_afbs.profile.schema import HeadProfile, Measurement
from vllm_afbs.tuning.journal import Steps
from vllm_afbs.tuning.search.bracket import (
    CurveSearch,
    most_sparsity,
    raised,
    score_at,
    sparsity_at,
)
from vllm_afbs.tuning.search.curve import Curve
from vllm_afbs.tuning.search.depth import tau_of
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.explore import EXPLORE_Q_BLOCKS, begin, explore
from vllm_afbs.tuning.search.results import HeldOut, LayerCurves, Settled
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.search.validation import HELD_OUT_Q_BLOCKS, Validation

FACTORS = (1.0, 2.0, 4.0, 0.5, 0.25)
"""The tolerances that every head is searched for, in units of the job's and in that order: each
begins beside one that was searched before."""
CURVE_Q_BLOCKS = 32
"""Query blocks scored at the longest length; chosen on SmolLM2-135M at lengths to 8192."""
CURVE_STEPS = 9
"""Scores of a head at most, so that a head takes 16 evaluations in all; heads whose error falls in
steps need most of them, and may end without the tightest tolerances."""
# Shares of a layer's time, for the progress bar only.
_EXPLORE_SHARE, _CURVE_SHARE, _VALIDATE_SHARE = 0.2, 0.4, 0.4

T = TypeVar("T")


class LayerSearch:
    """The search over one layer.

    Args:
        settings: The job's settings.
        layer: Which layer.
        capture: Its Q, K and V.
        journal: Where steps are kept; a journal, or what a worker sends to one.
        on_progress: Called with each further share of the layer that is done; they add up to 1.
    """

    def __init__(
        self,
        settings: SearchSettings,
        layer: int,
        capture: Capture,
        journal: Steps,
        on_progress: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._layer = layer
        self._scorer = LayerScorer(settings, layer, capture)
        self._journal = journal
        self._on_progress = on_progress

    def curves(self) -> LayerCurves:
        """Runs or replays the three stages."""
        lengths: dict[int, Curve] = {}
        for length in self._settings.lengths[:-1]:
            lengths[length] = self._step(
                f"explore {length}",
                Curve,
                partial(explore, self._settings, self._scorer, length, dict(lengths)),
            )
        self._on_progress(_EXPLORE_SHARE)
        longest = self._step("curve", Curve, lambda: self._draw(lengths))
        lengths[self._settings.longest] = longest
        self._on_progress(_CURVE_SHARE)
        ends = [self._settings.tolerance * end for end in (max(FACTORS), min(FACTORS))]
        validation = Validation(self._settings, self._scorer, longest)
        held_out = self._step("held out", HeldOut, lambda: validation.run(ends))
        self._on_progress(_VALIDATE_SHARE)
        tolerance = self._settings.tolerance
        searched = tuple(tolerance * factor for factor in FACTORS)
        return LayerCurves(lengths, held_out, tolerance, searched)

    def settled(self, tolerances: Sequence[float]) -> dict[float, tuple[HeadProfile, ...]]:
        """The heads' entries in the profile at some tolerances."""
        curves = self.curves()
        found = {}
        for tolerance in tolerances:
            settle = partial(self._settle, curves, tolerance)
            found[tolerance] = self._step(f"settle {tolerance!r}", Settled, settle).heads
        return found

    def _step(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        return self._journal.step(f"layer {self._layer} {name}", kind, compute, self._scorer)

    def _draw(self, shorter: dict[int, Curve]) -> Curve:
        """Stage 2: the curve at the longest length."""
        settings = self._settings
        evaluator = self._longest()
        start, slope = begin(settings, evaluator.num_heads, settings.longest, shorter)
        search = CurveSearch(
            [settings.tolerance * factor for factor in FACTORS],
            start,
            slope,
            most_sparsity(evaluator),
        )
        curve = search.run(lambda tau: score_at(evaluator, tau), CURVE_STEPS)
        self._scorer.count(evaluator, search.evaluations)
        depths = tuple(raised(evaluator, depth) for depth in curve.depths)
        return Curve(depths, curve.errors, curve.sparsities)

    def _settle(self, curves: LayerCurves, tolerance: float) -> Settled:
        depth = curves.depth(tolerance)
        errors = [curve.error_at(depth) for curve in curves.lengths.values()]
        # Measured points were raised when they were measured.
        is_point = (torch.stack(curves.longest.depths) == depth).any(dim=0)
        depth = torch.where(is_point, depth, raised(self._longest(), depth))
        tau = tau_of(depth).float()
        calibration = []
        for length, error in zip(curves.lengths, errors, strict=True):
            blocks = CURVE_Q_BLOCKS if length == self._settings.longest else EXPLORE_Q_BLOCKS
            evaluator = self._scorer.evaluator(CALIBRATION, length, blocks)
            calibration.append((length, error, sparsity_at(evaluator, tau)))
        windows = self._scorer.held_out
        q_blocks = HELD_OUT_Q_BLOCKS * len(curves.held_out.texts) // len(windows)
        held_out = [
            sparsity_at(self._scorer.evaluator(window, self._settings.longest, q_blocks), tau)
            for window in windows
        ]
        validation = curves.held_out.error_at(depth), torch.stack(held_out).mean(dim=0)
        heads = tuple(
            HeadProfile(
                tau=float(tau[head]),
                theta=THETA_OFF,
                calibration=[
                    _measurement(length, tau, error, sparsity, head)
                    for length, error, sparsity in calibration
                ],
                validation=_measurement(self._settings.longest, tau, *validation, head),
            )
            for head in range(len(tau))
        )
        return Settled(heads)

    def _longest(self) -> LayerEvaluator:
        return self._scorer.evaluator(CALIBRATION, self._settings.longest, CURVE_Q_BLOCKS)


def _measurement(
    length: int, tau: torch.Tensor, error: torch.Tensor, sparsity: torch.Tensor, head: int
) -> Measurement:
    if tau[head] >= 1.0:
        return Measurement(length=length, error=0.0, sparsity=0.0)
    # A head that keeps all blocks at a short length can come out at -1e-17.
    return Measurement(
        length=length, error=float(error[head]), sparsity=max(0.0, float(sparsity[head]))
    )
