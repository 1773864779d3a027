"""AFBS-BO for one layer: explore on short contexts, refine on the longest, validate on other text.

1. *Explore* (``explore``): Ax proposes quantiles (which set each head's theta) and lengths. Inside
   a trial, each head's tau is searched roughly. Each head takes the theta with which it skips most
   at the longest length, where leaving theta off is always tried.
2. *Refine* (``refine``): tau is searched again with more query rows. A head with a theta is refined
   without it, too, and keeps it only if it gains from it here.
3. *Validate* (``validation``): heads whose error on held-out text is above 1.2 x the tolerance back
   off and, if that does not help, run dense; so do heads that would skip less than a tenth.
"""

from benchmarks.theta_tuner.explore import EXPLORE_Q_BLOCKS, Explorer
from benchmarks.theta_tuner.refine import REFINE_Q_BLOCKS, refine
from benchmarks.theta_tuner.results import (
    Explored,
    Refined,
    Validated,
)
from benchmarks.theta_tuner.validation import validate
from vllm_afbs.profile.schema import LayerLevel
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings

# Shares of a layer's time, for the progress bar only.
_EXPLORE_SHARE, _REFINE_SHARE, _VALIDATE_SHARE = 0.4, 0.2, 0.4


class ThetaLayerSearch(LayerSearch):
    """The search over one layer."""

    def run(self) -> LayerLevel:
        """Runs or replays the three stages."""
        refined = self._refined(self._explore())
        self._on_progress(_REFINE_SHARE)
        validated = self._step(
            "validate", Validated, lambda: self._validate(refined, self._settings)
        )
        self._on_progress(_VALIDATE_SHARE)
        return LayerLevel(heads=list(validated.heads))

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
