"""AFBS-BO for one layer: explore on short contexts, refine on the longest, validate on other text.

1. *Explore*: Ax proposes a guard (through it, each head's theta) and a length; inside the trial
   each head's tau is searched. The guard that the model expects to be best is always tried at the
   longest length before it counts.
2. *Refine*: each head takes the best theta of the longest-length trials and searches tau with all
   query rows.
3. *Validate*: heads whose error on held-out text is above 1.2 x the tolerance back off and, if
   that does not help, run dense; so do heads that would skip less than a tenth.

One evaluation is one head scored
once, cached or not, and it costs (length / longest)^2 x the share of rows scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.kernels.selection import THETA_OFF
from vllm_afbs.profile import HeadProfile, LayerProfile, Measurement
from vllm_afbs.tuning.bracket import Accepted, TauSearch, depth_of, tau_of
from vllm_afbs.tuning.capture import Capture
from vllm_afbs.tuning.evaluator import HeadScores, LayerEvaluator
from vllm_afbs.tuning.journal import Journal, Record

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
VALIDATION_STEPS = 5
HELD_OUT_SLACK = 1.2
MIN_SPARSITY = 0.1
START_TAU = 0.93
# Shares of a layer's time, for the progress bar only.
_TRIAL_SHARE, _REFINE_SHARE, _VALIDATE_SHARE = 0.06, 0.25, 0.25


@dataclass(frozen=True)
class SearchSettings:
    """What a search depends on besides the model and the text.

    Attributes:
        lengths: Fidelities in tokens, shortest first, at least two.
        tolerance: Largest relative L1 error of a head on the calibration text.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        seed: Of everything random.
    """

    lengths: list[int]
    tolerance: float
    block_q: int
    block_k: int
    seed: int


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
        self._capture = capture
        self._journal = journal
        self._on_progress = on_progress
        self._longest = settings.lengths[-1]
        self._evaluators: dict[tuple[str, int, int | None], LayerEvaluator] = {}
        self._evaluations = 0
        self._cost = 0.0

    def run(self) -> LayerProfile:
        """Runs or replays the three stages."""
        trials = self._explore()
        refined = self._step("refine", lambda: self._refine(trials))
        self._on_progress(_REFINE_SHARE)
        final = self._step("validate", lambda: self._validate(refined))
        self._on_progress(_VALIDATE_SHARE)
        return LayerProfile(heads=[HeadProfile.model_validate(head) for head in final["heads"]])

    def _step(self, name: str, compute: Callable[[], Record]) -> Record:
        def counted() -> Record:
            self._evaluations, self._cost = 0, 0.0
            result = compute()
            return {**result, "evaluations": self._evaluations, "cost": self._cost}

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
        return [trial for trial in trials if trial["length"] == self._longest]

    def _propose(self, trials: list[Record]) -> tuple[float, int] | None:
        if not trials:
            # Without guarding first: it is the answer wherever key blocks are alike throughout.
            return 0.0, self._settings.lengths[0]
        optimizer = self._optimizer(trials)
        if len(trials) < INITIAL_TRIALS:
            return optimizer.initial(len(trials) - 1)
        return optimizer.propose()

    def _best_guard(self, trials: list[Record]) -> float:
        return self._optimizer(trials).best_guard()

    def _try_longest(
        self, name: str, guard: Callable[[list[Record]], float], trials: list[Record]
    ) -> list[Record]:
        def compute() -> Record:
            point = guard(trials), self._longest
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
        theta = self._evaluator("calibration", self._longest, EXPLORE_Q_BLOCKS).guard_theta(guard)
        evaluator = self._evaluator("calibration", length, EXPLORE_Q_BLOCKS)
        everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
        search = TauSearch(self._settings.tolerance, _start(point, trials, everyone), everyone)
        best = search.run(
            lambda tau: evaluator.score(HeadThresholds(tau, theta)), max_steps=TRIAL_STEPS
        )
        self._count(evaluator, search.evaluations)
        return {"guard": guard, "length": length, "theta": theta.tolist(), **_record(best)}

    # Stage 2

    def _refine(self, trials: list[Record]) -> Record:
        sparsity = torch.tensor([trial["sparsity"] for trial in trials])
        choice = sparsity.argmax(dim=0)[None]
        theta = torch.tensor([trial["theta"] for trial in trials]).gather(0, choice)[0]
        start = torch.tensor([trial["tau"] for trial in trials]).gather(0, choice)[0]
        evaluator = self._evaluator("calibration", self._longest, REFINE_Q_BLOCKS)
        worth = sparsity.amax(dim=0) >= MIN_SPARSITY
        search = TauSearch(self._settings.tolerance, start, worth)
        best = search.run(
            lambda tau: evaluator.score(HeadThresholds(tau, theta)), max_steps=REFINE_STEPS
        )
        self._count(evaluator, search.evaluations)
        return {"theta": theta.tolist(), **_record(best)}

    # Stage 3

    def _validate(self, refined: Record) -> Record:
        theta, tau = torch.tensor(refined["theta"]), torch.tensor(refined["tau"])
        evaluator = self._evaluator("validation", self._longest, None)
        limit = HELD_OUT_SLACK * self._settings.tolerance
        tau = torch.where(torch.tensor(refined["sparsity"]) >= MIN_SPARSITY, tau, 1.0)
        held_out = self._score(evaluator, tau, theta, tau < 1.0)
        for round_ in range(VALIDATION_STEPS):
            above = (tau < 1.0) & (held_out.error > limit)
            if not above.any():
                break
            back = torch.log(held_out.error / limit).float().clamp_min(0.1) * (1.0 + round_)
            last = round_ == VALIDATION_STEPS - 1
            deeper = torch.ones_like(tau) if last else tau_of(depth_of(tau) + back)
            tau = torch.where(above, deeper, tau)
            again = self._score(evaluator, tau, theta, above & (tau < 1.0))
            held_out = HeadScores(
                torch.where(above, again.error, held_out.error),
                torch.where(above, again.sparsity, held_out.sparsity),
            )
        tau = torch.where(held_out.sparsity >= MIN_SPARSITY, tau, 1.0)
        return {"heads": self._profiles(tau, theta, refined, held_out)}

    def _profiles(
        self, tau: torch.Tensor, theta: torch.Tensor, refined: Record, held_out: HeadScores
    ) -> list[Record]:
        sparse = tau < 1.0
        measured: list[tuple[int, HeadScores]] = []
        for length in self._settings.lengths[:-1]:
            evaluator = self._evaluator("calibration", length, EXPLORE_Q_BLOCKS)
            measured.append((length, self._score(evaluator, tau, theta, sparse)))
        moved = sparse & (tau != torch.tensor(refined["tau"]))
        longest = HeadScores(
            torch.tensor(refined["error"]).double(), torch.tensor(refined["sparsity"]).double()
        )
        if moved.any():
            evaluator = self._evaluator("calibration", self._longest, REFINE_Q_BLOCKS)
            again = self._score(evaluator, tau, theta, moved)
            longest = HeadScores(
                torch.where(moved, again.error, longest.error),
                torch.where(moved, again.sparsity, longest.sparsity),
            )
        measured.append((self._longest, longest))

        def measurement(length: int, scores: HeadScores, head: int) -> Measurement:
            if not sparse[head]:
                return Measurement(length=length, error=0.0, sparsity=0.0)
            return Measurement(
                length=length,
                error=float(scores.error[head]),
                sparsity=max(0.0, float(scores.sparsity[head])),
            )

        return [
            HeadProfile(
                tau=float(tau[head]),
                theta=min(1.0, float(theta[head])) if sparse[head] else THETA_OFF,
                calibration=[measurement(length, scores, head) for length, scores in measured],
                validation=measurement(self._longest, held_out, head),
            ).model_dump()
            for head in range(len(tau))
        ]

    def _score(
        self,
        evaluator: LayerEvaluator,
        tau: torch.Tensor,
        theta: torch.Tensor,
        heads: torch.Tensor,
    ) -> HeadScores:
        """Scores all heads in one pass; only ``heads`` count, the others are not looked at."""
        if not heads.any():
            zeros = torch.zeros(len(tau), dtype=torch.float64)
            return HeadScores(zeros, zeros.clone())
        self._count(evaluator, int(heads.sum()))
        return evaluator.score(HeadThresholds(tau, theta))

    def _count(self, evaluator: LayerEvaluator, evaluations: int) -> None:
        self._evaluations += evaluations
        self._cost += evaluations * (evaluator.length / self._longest) ** 2 * evaluator.row_share

    def _evaluator(self, window: str, length: int, q_blocks: int | None) -> LayerEvaluator:
        key = (window, length, q_blocks)
        if key not in self._evaluators:
            num_q_blocks = -(-length // self._settings.block_q)
            self._evaluators[key] = LayerEvaluator(
                self._capture.load(self._layer, window),
                length,
                self._settings.block_q,
                self._settings.block_k,
                row_share=min(1.0, q_blocks / num_q_blocks) if q_blocks else 1.0,
            )
        return self._evaluators[key]


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
