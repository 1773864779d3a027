"""AFBS-BO for one layer: explore on short contexts, refine on the longest, validate on other text.

1. *Explore*: Ax proposes a guard (through it, each head's theta) and a length; inside the trial
   each head's tau is searched. The guard that the model expects to be best, and no guard, are
   always tried at the longest length.
2. *Refine*: each head takes the best theta of its longest-length trials and searches tau again
   with more query rows, from the trial's tau.
3. *Validate* (``validation``): heads whose error on held-out text is above 1.2 x the tolerance
   back off and, if that does not help, run dense; so do heads that would skip less than a tenth.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile import HeadProfile, LayerProfile
from vllm_afbs.tuning.bracket import Accepted, TauSearch
from vllm_afbs.tuning.capture import Capture
from vllm_afbs.tuning.journal import Journal, Record
from vllm_afbs.tuning.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.validation import MIN_SPARSITY, validate

if TYPE_CHECKING:
    from vllm_afbs.tuning.bayes import LayerOptimizer

EXPLORE_Q_BLOCKS = 16
"""Query blocks scored while exploring, at every length: rows are a fidelity too."""
REFINE_Q_BLOCKS = 32
"""Query blocks scored while refining."""
INITIAL_TRIALS = 3
MAX_TRIALS = 6
TRIAL_STEPS = 5
REFINE_STEPS = 5
START_TAU = 0.93
# Shares of a layer's time, for the progress bar only.
_TRIAL_SHARE, _REFINE_SHARE, _VALIDATE_SHARE = 0.06, 0.25, 0.25


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
        trials = self._explore()
        refined = self._step("refine", lambda: self._refine(trials))
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

    def _explore(self) -> list[Record]:
        """Runs the trials of stage 1; returns those at the longest length."""
        trials: list[Record] = []
        while len(trials) < MAX_TRIALS:
            trial = self._step(
                f"trial {len(trials)}", lambda: self._try(self._propose(trials), trials)
            )
            if trial["guard"] is None:
                break
            trials.append(trial)
            self._on_progress(_TRIAL_SHARE)
        explored = len(trials)
        # What Ax expects to be best, and no guarding at all: a profile is never worse than that.
        trials += self._try_longest("best", self._best_guard, trials)
        trials += self._try_longest("unguarded", lambda _: 0.0, trials)
        # Ax stops early where there is nothing left to learn.
        self._on_progress(1.0 - _REFINE_SHARE - _VALIDATE_SHARE - explored * _TRIAL_SHARE)
        return [trial for trial in trials if trial["length"] == self._settings.longest]

    def _propose(self, trials: list[Record]) -> tuple[float, int] | None:
        if not trials:
            # Without guarding first: it is the answer wherever key blocks are alike throughout.
            return 0.0, self._settings.lengths[0]
        optimizer = self._optimizer(trials)
        if len(trials) < INITIAL_TRIALS:
            return optimizer.initial()
        return optimizer.propose()

    def _best_guard(self, trials: list[Record]) -> float:
        return self._optimizer(trials).best_guard()

    def _try_longest(
        self, name: str, guard: Callable[[list[Record]], float], trials: list[Record]
    ) -> list[Record]:
        def compute() -> Record:
            point = guard(trials), self._settings.longest
            tried = {(trial["guard"], trial["length"]) for trial in trials}
            return self._try(None if point in tried else point, trials)

        trial = self._step(f"target {name}", compute)
        return [] if trial["guard"] is None else [trial]

    def _optimizer(self, trials: list[Record]) -> "LayerOptimizer":
        # Imported here: Ax takes seconds, and a job that is replayed may not need it.
        from vllm_afbs.tuning.bayes import LayerOptimizer, Observation

        observations = [
            Observation(trial["guard"], trial["length"], sum(trial["sparsity"]) / len(trial["tau"]))
            for trial in trials
        ]
        sampling = len(trials) < INITIAL_TRIALS
        seed = self._settings.seed * 100_003 + self._layer * 101
        return LayerOptimizer(
            self._settings.lengths, observations, seed if sampling else seed + len(trials)
        )

    def _try(self, point: tuple[float, int] | None, trials: list[Record]) -> Record:
        if point is None:
            return {"guard": None}
        guard, length = point
        theta = self._scorer.evaluator(
            "calibration", self._settings.longest, EXPLORE_Q_BLOCKS
        ).guard_theta(guard)
        evaluator = self._scorer.evaluator("calibration", length, EXPLORE_Q_BLOCKS)
        everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
        search = TauSearch(self._settings.tolerance, _start(point, trials, everyone), everyone)
        best = search.run(
            lambda tau: evaluator.score(HeadThresholds(tau, theta)), max_steps=TRIAL_STEPS
        )
        self._scorer.count(evaluator, search.evaluations)
        return {"guard": guard, "length": length, "theta": theta.tolist(), **_record(best)}

    # Stage 2

    def _refine(self, trials: list[Record]) -> Record:
        sparsity = torch.tensor([trial["sparsity"] for trial in trials])
        choice = sparsity.argmax(dim=0)[None]
        theta = torch.tensor([trial["theta"] for trial in trials]).gather(0, choice)[0]
        start = torch.tensor([trial["tau"] for trial in trials]).gather(0, choice)[0]
        evaluator = self._scorer.evaluator("calibration", self._settings.longest, REFINE_Q_BLOCKS)
        worth = sparsity.amax(dim=0) >= MIN_SPARSITY
        search = TauSearch(self._settings.tolerance, start, worth)
        best = search.run(
            lambda tau: evaluator.score(HeadThresholds(tau, theta)), max_steps=REFINE_STEPS
        )
        self._scorer.count(evaluator, search.evaluations)
        return {"theta": theta.tolist(), **_record(best)}

    # Stage 3

    def _validate(self, refined: Record) -> Record:
        heads = validate(self._settings, self._scorer, refined, (EXPLORE_Q_BLOCKS, REFINE_Q_BLOCKS))
        return {"heads": [head.model_dump() for head in heads]}


def _start(point: tuple[float, int], trials: list[Record], everyone: torch.Tensor) -> torch.Tensor:
    """Each head's tau in the nearest trial that found one for it."""
    start = torch.full((len(everyone),), START_TAU)
    missing = everyone
    guard, length = point
    for trial in sorted(trials, key=lambda t: (abs(t["guard"] - guard), abs(t["length"] - length))):
        tau = torch.tensor(trial["tau"])
        start = torch.where(missing & (tau < 1.0), tau, start)
        missing = missing & (tau >= 1.0)
    return start


def _record(best: Accepted) -> Record:
    return {
        "tau": best.tau.tolist(),
        "error": best.error.tolist(),
        "sparsity": best.sparsity.tolist(),
    }
