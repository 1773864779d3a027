"""AFBS-BO for one layer: explore on short contexts, refine on the longest, validate on other text.

1. *Explore* (``explore``): Ax proposes guards (through them, each head's theta) and lengths; inside
   a trial each head's tau is searched roughly. Each head takes the guard that it skips most under
   at the longest length, where no guard is always tried.
2. *Refine*: tau is searched again with more query rows, from the trial's tau and slope.
3. *Validate* (``validation``): heads whose error on held-out text is above 1.2 x the tolerance
   back off and, if that does not help, run dense; so do heads that would skip less than a tenth.
"""

from collections.abc import Callable

import torch

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile import HeadProfile, LayerProfile
from vllm_afbs.tuning.bracket import Accepted, TauSearch
from vllm_afbs.tuning.capture import Capture
from vllm_afbs.tuning.explore import EXPLORE_Q_BLOCKS, Explorer
from vllm_afbs.tuning.journal import Journal, Record
from vllm_afbs.tuning.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.validation import MIN_SPARSITY, validate

REFINE_Q_BLOCKS = 32
"""Query blocks scored while refining."""
REFINE_STEPS = 5
# Shares of a layer's time, for the progress bar only.
_EXPLORE_SHARE, _REFINE_SHARE, _VALIDATE_SHARE = 0.4, 0.2, 0.4


class LayerSearch:
    """The search over one layer.

    Args:
        settings: The job's settings.
        layer: Which layer.
        capture: Its Q, K and V.
        journal: Where steps are kept.
        on_progress: Called with each further share of the layer that is done; they add up to 1.
    """

    def __init__(
        self,
        settings: SearchSettings,
        layer: int,
        capture: Capture,
        journal: Journal,
        on_progress: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._layer = layer
        self._scorer = LayerScorer(settings, layer, capture)
        self._journal = journal
        self._on_progress = on_progress

    def run(self) -> LayerProfile:
        """Runs or replays the three stages."""
        explored = self._explore()
        refined = self._step("refine", lambda: self._refine(explored))
        self._on_progress(_REFINE_SHARE)
        validated = self._step("validate", lambda: self._validate(refined))
        self._on_progress(_VALIDATE_SHARE)
        return LayerProfile(heads=[HeadProfile.model_validate(head) for head in validated["heads"]])

    def _step(self, name: str, compute: Callable[[], Record]) -> Record:
        def counted() -> Record:
            self._scorer.reset()
            result = compute()
            counts = {"evaluations": self._scorer.evaluations, "cost": self._scorer.cost}
            return {**result, **counts}

        return self._journal.step(f"layer {self._layer} {name}", counted)

    # Stage 1

    def _explore(self) -> Record:
        return Explorer(
            self._settings,
            self._layer,
            self._scorer,
            self._step,
            lambda share: self._on_progress(_EXPLORE_SHARE * share),
        ).run()

    # Stage 2

    def _refine(self, explored: Record) -> Record:
        theta, start, slope, sparsity = (
            torch.tensor(explored[name]) for name in ("theta", "tau", "slope", "sparsity")
        )
        evaluator = self._scorer.evaluator("calibration", self._settings.longest, REFINE_Q_BLOCKS)
        worth = sparsity >= MIN_SPARSITY
        search = TauSearch(self._settings.tolerance, start, worth, slope)
        best = search.run(
            lambda tau: evaluator.score(HeadThresholds(tau, theta)), max_steps=REFINE_STEPS
        )
        self._scorer.count(evaluator, search.evaluations)
        return {"theta": theta.tolist(), **_record(best)}

    # Stage 3

    def _validate(self, refined: Record) -> Record:
        heads = validate(self._settings, self._scorer, refined, (EXPLORE_Q_BLOCKS, REFINE_Q_BLOCKS))
        return {"heads": [head.model_dump() for head in heads]}


def _record(best: Accepted) -> Record:
    return {
        "tau": best.tau.tolist(),
        "error": best.error.tolist(),
        "sparsity": best.sparsity.tolist(),
    }
