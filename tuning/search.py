"""AFBS-BO for one layer: explore on short contexts, refine on the longest, validate on other text.

1. *Explore* (``explore``): Ax proposes guards (through them, each head's theta) and lengths; inside
   a trial each head's tau is searched roughly. Each head takes the guard that it skips most under
   at the longest length, where no guard is always tried.
2. *Refine*: tau is searched again with more query rows, from the trial's tau and slope, and then
   raised as far as it drops the same blocks. A head with a guard is refined without it, too, and
   keeps it only if it gains from it here.
3. *Validate* (``validation``): heads whose error on held-out text is above 1.2 x the tolerance
   back off and, if that does not help, run dense; so do heads that would skip less than a tenth.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.profile.schema import HeadProfile, LayerProfile
from vllm_afbs.tuning.bracket import (
    MAX_DEPTH,
    MIN_DEPTH,
    AtTheta,
    TauSearch,
    depth_of,
    tau_of,
)
from vllm_afbs.tuning.capture import Capture
from vllm_afbs.tuning.explore import EXPLORE_Q_BLOCKS, Explorer, best_of
from vllm_afbs.tuning.journal import Record, Steps
from vllm_afbs.tuning.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.validation import MIN_SPARSITY, validate
from vllm_afbs.tuning.windows import CALIBRATION

REFINE_Q_BLOCKS = 32
"""Query blocks scored while refining."""
REFINE_STEPS = 9
"""Enough for heads whose error falls in steps; five left one in a hundred of them dense."""
_LEAST_ERROR = 1e-6  # a head that keeps nearly all blocks has next to none
# Shares of a layer's time, for the progress bar only.
_EXPLORE_SHARE, _REFINE_SHARE, _VALIDATE_SHARE = 0.4, 0.2, 0.4


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
            tolerance: The layer's own, if it is not to have the job's: stages 2 and 3 are then run
                again with it, from where stage 2 ended with the job's.
        """
        explored = self._explore()
        refined = self._step("refine", lambda: self._refine(explored))
        settings, suffix = self._settings, ""
        if tolerance is not None:
            settings, suffix = replace(settings, tolerance=tolerance), f" within {tolerance!r}"
            start = self._expected(explored, refined, tolerance)
            refined = self._step(f"refine{suffix}", lambda: self._refine_tau(start, tolerance))
        self._on_progress(_REFINE_SHARE)
        validated = self._step(f"validate{suffix}", lambda: self._validate(refined, settings))
        self._on_progress(_VALIDATE_SHARE)
        heads = [HeadProfile.model_validate(head) for head in validated["heads"]]
        return LayerProfile(heads=heads, tolerance=tolerance)

    def sparsities(self, tolerances: Sequence[float]) -> list[float]:
        """What a layer that was run would skip at other tolerances, by the slopes of stage 2.

        Nothing is attended for it.

        Args:
            tolerances: Relative L1 errors.

        Returns:
            Mean sparsity of the heads for each, at the longest length.
        """
        explored = self._explore()
        refined = self._step("refine", lambda: self._refine(explored))

        def levels() -> Record:
            expected = [self._expected(explored, refined, each)["sparsity"] for each in tolerances]
            return {"sparsities": [sum(sparsity) / len(sparsity) for sparsity in expected]}

        read: list[float] = self._step("levels", levels)["sparsities"]
        return read

    def at_shortest(self) -> tuple[HeadThresholds, torch.Tensor]:
        """Thresholds near the tolerance at the shortest length, and what error they make there.

        The final thresholds would not do: made for the longest length, they may drop nothing at a
        short one.

        Returns:
            Thresholds without a guard, from stage 1, and the error of each head, ``[num_heads]``.
        """
        length = self._settings.lengths[0]
        explorer = self._explorer()
        explorer.run()
        trial = explorer.without_guard(length)
        tau = torch.tensor(trial["tau"])
        thresholds = HeadThresholds(tau, torch.tensor(trial["theta"]))

        def measure() -> Record:
            evaluator = self._scorer.evaluator(CALIBRATION, length, None)
            scores = self._scorer.score(evaluator, thresholds, tau < 1.0)
            return {"error": torch.where(tau < 1.0, scores.error, 0.0).tolist()}

        return thresholds, torch.tensor(self._step("at shortest", measure)["error"])

    def _step(self, name: str, compute: Callable[[], Record]) -> Record:
        def counted() -> Record:
            self._scorer.reset()
            result = compute()
            counts = {"evaluations": self._scorer.evaluations, "cost": self._scorer.cost}
            return {**result, **counts}

        return self._journal.step(f"layer {self._layer} {name}", counted)

    # Stage 1

    def _explore(self) -> Record:
        return self._explorer().run()

    def _explorer(self) -> Explorer:
        return Explorer(
            self._settings,
            self._layer,
            self._scorer,
            self._step,
            lambda share: self._on_progress(_EXPLORE_SHARE * share),
        )

    # Stage 2

    def _refine(self, explored: Record) -> Record:
        """Searches tau again; a head that stage 1 gave a guard has to gain from it here, too.

        Stage 1 takes the best of several rough readings. On SmolLM2 one such gain of ten is there
        when all rows are scored, and without the others held-out text skips more.
        """
        tolerance = self._settings.tolerance
        refined = self._refine_tau(explored, tolerance)
        guarded = torch.tensor(explored["theta"]) > THETA_OFF
        if not guarded.any():
            return refined
        unguarded = self._refine_tau(explored["free"], tolerance, guarded)
        return best_of(unguarded, [refined])

    def _refine_tau(
        self, start: Record, tolerance: float, heads: torch.Tensor | None = None
    ) -> Record:
        """Searches the tau of all heads, or of some, that ``start`` says may be worth it."""
        theta, tau, slope, sparsity = (
            torch.tensor(start[name]) for name in ("theta", "tau", "slope", "sparsity")
        )
        evaluator = self._scorer.evaluator(CALIBRATION, self._settings.longest, REFINE_Q_BLOCKS)
        layer, worth = AtTheta(evaluator, theta), sparsity >= MIN_SPARSITY
        if heads is not None:
            worth &= heads
        search = TauSearch(tolerance, tau, worth, slope, most=layer.most)
        best = search.run(layer.score, max_steps=REFINE_STEPS)
        self._scorer.count(evaluator, search.evaluations)
        return {
            "theta": theta.tolist(),
            "slope": search.slope.tolist(),
            "tau": layer.raised(best.tau).tolist(),
            "error": best.error.tolist(),
            "sparsity": best.sparsity.tolist(),
        }

    def _expected(self, explored: Record, refined: Record, tolerance: float) -> Record:
        """Where each head should begin at another tolerance, read off the line of log error."""
        accepted = torch.tensor(refined["tau"]) < 1.0
        tau, slope, theta = (
            # Of a head that was left dense, stage 1 has said where it would meet the tolerance.
            torch.where(accepted, torch.tensor(refined[name]), torch.tensor(explored[name]))
            for name in ("tau", "slope", "theta")
        )
        error = torch.where(accepted, torch.tensor(refined["error"]), self._settings.tolerance)
        further = torch.log(error.clamp_min(_LEAST_ERROR) / tolerance) / slope
        depth = (depth_of(tau).clamp_max(MAX_DEPTH) + further).clamp_min(MIN_DEPTH)
        moved = torch.where(depth < MAX_DEPTH, tau_of(depth), 1.0)
        evaluator = self._scorer.evaluator(CALIBRATION, self._settings.longest, REFINE_Q_BLOCKS)
        sparsity = evaluator.sparsity(HeadThresholds(moved, theta))
        sparsity = torch.where((moved < 1.0) & (sparsity >= MIN_SPARSITY), sparsity, 0.0)
        return {
            "theta": theta.tolist(),
            "tau": moved.tolist(),
            "slope": slope.tolist(),
            "sparsity": sparsity.tolist(),
        }

    # Stage 3

    def _validate(self, refined: Record, settings: SearchSettings) -> Record:
        heads = validate(settings, self._scorer, refined, (EXPLORE_Q_BLOCKS, REFINE_Q_BLOCKS))
        return {"heads": [head.model_dump() for head in heads]}
