"""AFBS-BO for one layer: explore on short contexts, refine on the longest, validate on other text.

1. *Explore* (``explore``): Ax proposes quantiles (which set each head's theta) and lengths. Inside
   a trial, each head's tau is searched roughly. Each head takes the theta with which it skips most
   at the longest length, where leaving theta off is always tried.
2. *Refine* (``refine``): tau is searched again with more query rows. A head with a theta is refined
   without it, too, and keeps it only if it gains from it here.
3. *Validate* (``validation``): heads whose error on held-out text is above 1.2 x the tolerance back
   off and, if that does not help, run dense; so do heads that would skip less than a tenth.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import LayerProfile
from vllm_afbs.tuning.journal import Steps
from vllm_afbs.tuning.search.explore import EXPLORE_Q_BLOCKS, Explorer
from vllm_afbs.tuning.search.refine import REFINE_Q_BLOCKS, expected, refine, refine_tau
from vllm_afbs.tuning.search.results import (
    Explored,
    LevelSparsities,
    Refined,
    ShortestErrors,
    Validated,
)
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.search.validation import validate

# Shares of a layer's time, for the progress bar only.
_EXPLORE_SHARE, _REFINE_SHARE, _VALIDATE_SHARE = 0.4, 0.2, 0.4

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

    def run(self, tolerance: float | None = None) -> LayerProfile:
        """Runs or replays the three stages.

        Args:
            tolerance: The layer's own tolerance; None for the job's. With its own, stages 2 and 3
                run again from where stage 2 ended with the job's.
        """
        explored = self._explore()
        refined = self._refined(explored)
        settings, suffix = self._settings, ""
        if tolerance is not None:
            settings, suffix = replace(settings, tolerance=tolerance), f" within {tolerance!r}"
            start = expected(self._settings, self._scorer, explored, refined, tolerance)
            refined = self._step(
                f"refine{suffix}", Refined, lambda: refine_tau(settings, self._scorer, start)
            )
        self._on_progress(_REFINE_SHARE)
        validated = self._step(
            f"validate{suffix}", Validated, lambda: self._validate(refined, settings)
        )
        self._on_progress(_VALIDATE_SHARE)
        return LayerProfile(heads=list(validated.heads), tolerance=tolerance)

    def sparsities(self, tolerances: Sequence[float]) -> Sequence[float]:
        """What a layer that was run would skip at other tolerances, by the slopes of stage 2.

        This reads selections and scores nothing.

        Args:
            tolerances: Relative L1 errors.

        Returns:
            Mean sparsity of the heads for each, at the longest length.
        """
        explored = self._explore()
        refined = self._refined(explored)

        def levels() -> LevelSparsities:
            starts = [
                expected(self._settings, self._scorer, explored, refined, tolerance)
                for tolerance in tolerances
            ]
            return LevelSparsities(tuple(float(each.sparsity.mean()) for each in starts))

        return self._step("levels", LevelSparsities, levels).sparsities

    def at_shortest(self) -> tuple[HeadThresholds, torch.Tensor]:
        """Thresholds near the tolerance at the shortest length, and what error they make there.

        The final thresholds would not do: made for the longest length, they may drop nothing at a
        short one.

        Returns:
            Thresholds without theta, from stage 1, and the error of each head, ``[num_heads]``.
        """
        length = self._settings.lengths[0]
        explorer = self._explorer()
        explorer.run()
        thresholds = explorer.without_theta(length).thresholds
        sparse = thresholds.tau < 1.0

        def measure() -> ShortestErrors:
            evaluator = self._scorer.evaluator(CALIBRATION, length, None)
            scores = self._scorer.score(evaluator, thresholds, sparse)
            return ShortestErrors(torch.where(sparse, scores.error, 0.0).float())

        return thresholds, self._step("shortest", ShortestErrors, measure).error

    def _step(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        return self._journal.step(f"layer {self._layer} {name}", kind, compute, self._scorer)

    def _explorer(self) -> Explorer:
        return Explorer(
            self._settings,
            self._layer,
            self._scorer,
            self._step,
            lambda share: self._on_progress(_EXPLORE_SHARE * share),
        )

    def _refined(self, explored: Explored) -> Refined:
        return self._step("refine", Refined, lambda: self._refine(explored))

    # The stages; benchmarks replace one or another.

    def _explore(self) -> Explored:
        return self._explorer().run()

    def _refine(self, explored: Explored) -> Refined:
        return refine(self._settings, self._scorer, explored)

    def _validate(self, refined: Refined, settings: SearchSettings) -> Validated:
        return validate(settings, self._scorer, refined, (EXPLORE_Q_BLOCKS, REFINE_Q_BLOCKS))
