"""Stage 1 of a layer's search: which theta each head should take, from trials that are rough.

1. *Without theta*, at every length, shortest first: each head's tau, and how fast its error falls
   as tau grows, carry over to the next length.
2. *Theta trials*: Ax proposes a quantile (which sets each head's theta) and a length. The value of
   a trial is what the layer would skip if each head could also leave theta off. Heads that could
   not skip more under their theta at any tau are not scored, and a layer that gained from none of
   the first quantiles gets no further trial.
3. *The longest length*: heads that gained try the quantile that the model expects to be best there.
   Those that still gain nothing there try the one from which they gained the most elsewhere.

A trial stops near the tolerance and reads tau off a line, or takes the largest that skips the same.
The choice of theta needs no more, and nothing is accepted before stage 2 has measured it. The
sparsity at a tau that was not scored is exact all the same: it needs only the selection.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from benchmarks.theta_tuner.bracket import AtTheta, TauSearch
from benchmarks.theta_tuner.results import Attempt, Candidate, Explored, ThetaTrial, Trial
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.tuning.search.depth import MIN_DEPTH, START_SLOPE, depth_of, tau_of
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

if TYPE_CHECKING:
    from benchmarks.theta_tuner.bayes import LayerOptimizer

EXPLORE_Q_BLOCKS = 16
"""Query blocks scored while exploring, at every length: the number of rows is a fidelity, too.

Chosen on SmolLM2-135M at lengths to 8192 and a tolerance of 0.05.
"""
INITIAL_THETA_TRIALS = 2
"""Sobol points before the model proposes; chosen with ``MAX_THETA_TRIALS``."""
MAX_THETA_TRIALS = 5
"""Chosen on SmolLM2-135M at lengths to 8192, where trials of thetas that lose had taken most of 27
evaluations a head."""
HEAD_GAIN = 0.02
"""Sparsity that theta must add to a head.

Less is within a trial's reading error, and held-out text does not confirm it: measured on
SmolLM2-135M at lengths to 8192 and a tolerance of 0.05.
"""
LAYER_GAIN = 0.01
"""Sparsity that theta must add to the mean over heads for Ax to go on.

Chosen on SmolLM2-135M at lengths to 8192.
"""
STEPS = 2
"""Scores of a trial: the fewest that show a slope, which holds for any model."""
START_TAU = 0.93
"""Where the first trial of every layer begins; chosen on SmolLM2-135M.

To start where the layer before ended saves nothing (two samples of SmolLM2-135M: 11.0 and 12.5
evaluations a head, against 11.2 and 12.2), and would make layers depend on each other.
"""
_NEARNESS = 0.3
"""How far in log error a trial may end from the tolerance. Over that distance, log error of
SmolLM2-135M's heads is a line in depth."""
_HARD_DEPTH = 6.0
"""Where a head begins that skipped nothing in the trial it carries over from. It is between
``START_TAU``'s depth (2.7) and ``MAX_DEPTH``; chosen on SmolLM2-135M."""
_DAMPING = 0.7
"""Depth grows by less from each length to the next; chosen on SmolLM2-135M at lengths to 8192."""

T = TypeVar("T")
PerHead = TypeVar("PerHead", bound=Candidate)


class StepRunner(Protocol):
    """Runs or replays a named step of a layer's search."""

    def __call__(self, name: str, kind: type[T], compute: Callable[[], T], /) -> T:
        """Returns the step's result, of type ``kind``."""


class Explorer:
    """Stage 1 over one layer.

    Args:
        settings: The job's settings.
        layer: Which layer.
        scorer: Its evaluators.
        step: Runs or replays a named step.
        on_progress: Called with each further share of the stage that is done; they add up to 1.
    """

    def __init__(
        self,
        settings: SearchSettings,
        layer: int,
        scorer: LayerScorer,
        step: StepRunner,
        on_progress: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._layer = layer
        self._scorer = scorer
        self._step = step
        self._on_progress = on_progress
        self._without_theta: dict[int, Trial] = {}  # by length
        self._theta_trials: list[ThetaTrial] = []
        self._done = 0
        self._most_trials = len(settings.lengths) + MAX_THETA_TRIALS + 2

    def run(self) -> Explored:
        """Runs or replays the trials."""
        self._run_without_theta()
        while len(self._theta_trials) < MAX_THETA_TRIALS:
            trial = self._attempt(f"theta {len(self._theta_trials)}", self._try_proposal)
            if trial is None:
                break
            self._theta_trials.append(trial)
        best = self._attempt("target best", self._try_best_quantile)
        if best is not None:
            self._theta_trials.append(best)
        own = self._trial("target own", Trial, self._try_own_quantiles)
        self._on_progress(1.0 - self._done / self._most_trials)
        without = self._without_theta[self._settings.longest]
        return Explored(best_of(without, [*self._at_longest(), own]), without)

    def without_theta(self, length: int) -> Trial:
        """The trial without theta at a length, once ``run`` has been called."""
        return self._without_theta[length]

    def _trial(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        trial = self._step(name, kind, compute)
        self._done += 1
        self._on_progress(1.0 / self._most_trials)
        return trial

    def _attempt(self, name: str, compute: Callable[[], ThetaTrial | None]) -> ThetaTrial | None:
        return self._trial(name, Attempt, lambda: Attempt(compute())).trial

    def _evaluator(self, length: int) -> LayerEvaluator:
        return self._scorer.evaluator(CALIBRATION, length, EXPLORE_Q_BLOCKS)

    # Without theta

    def _run_without_theta(self) -> None:
        for length in self._settings.lengths:
            compute = partial(self._search_without_theta, length)
            self._without_theta[length] = self._trial(f"tau {length}", Trial, compute)

    def _search_without_theta(self, length: int) -> Trial:
        evaluator = self._evaluator(length)
        theta = evaluator.theta_at(0.0)
        start, slope = torch.full_like(theta, START_TAU), torch.full_like(theta, START_SLOPE)
        if shorter := list(self._without_theta.values()):
            start, slope = _carried(length, shorter), shorter[-1].slope
        everyone = torch.ones(len(theta), dtype=torch.bool)
        return self._search(AtTheta(evaluator, theta), everyone, start, slope)

    # Theta trials

    def _try_proposal(self) -> ThetaTrial | None:
        if (point := self._propose()) is None:
            return None
        quantile, length = point
        quantiles = torch.full_like(self._without_theta[length].tau, quantile)
        return _with_quantile(self._search_with_theta(quantiles, length), quantile)

    def _propose(self) -> tuple[float, int] | None:
        if len(self._theta_trials) < INITIAL_THETA_TRIALS:
            return self._optimizer().initial()
        if max(float(self._gain(trial).mean()) for trial in self._theta_trials) < LAYER_GAIN:
            return None
        return self._optimizer().propose()

    def _optimizer(self) -> "LayerOptimizer":
        # Imported here: Ax takes seconds, and a job that is replayed may not need it.
        from benchmarks.theta_tuner.bayes import LayerOptimizer, Observation

        without = [
            Observation(0.0, length, float(trial.sparsity.mean()))
            for length, trial in self._without_theta.items()
        ]
        with_theta = [
            Observation(trial.quantile, trial.length, float(self._with_choice(trial).mean()))
            for trial in self._theta_trials
        ]
        seed = self._settings.seed * 100_003 + self._layer * 101
        if len(self._theta_trials) >= INITIAL_THETA_TRIALS:  # no longer one Sobol sequence
            seed += len(self._theta_trials)
        return LayerOptimizer(self._settings.lengths, [*without, *with_theta], seed)

    def _with_choice(self, trial: Trial) -> torch.Tensor:
        """What each head skips at a trial's length if it may also leave theta off."""
        return self._without_theta[trial.length].sparsity + self._gain(trial)

    def _gain(self, trial: Trial) -> torch.Tensor:
        """What each head skips more than without theta at that length; 0 if not enough."""
        gain = trial.sparsity - self._without_theta[trial.length].sparsity
        return torch.where(gain >= HEAD_GAIN, gain, 0.0)

    def _at_longest(self) -> list[ThetaTrial]:
        return [trial for trial in self._theta_trials if trial.length == self._settings.longest]

    def _try_best_quantile(self) -> ThetaTrial | None:
        gained = torch.stack([self._gain(trial) > 0.0 for trial in self._theta_trials]).any(dim=0)
        if not gained.any():
            return None
        quantile = self._optimizer().best_quantile()
        if quantile in [0.0, *(trial.quantile for trial in self._at_longest())]:
            return None
        quantiles = torch.where(gained, quantile, 0.0)
        return _with_quantile(self._search_with_theta(quantiles, self._settings.longest), quantile)

    def _try_own_quantiles(self) -> Trial:
        gains = torch.stack([self._gain(trial) for trial in self._theta_trials])
        tried = torch.tensor([trial.quantile for trial in self._theta_trials])
        waiting = gains.amax(dim=0) > 0.0
        for trial in self._at_longest():
            waiting &= self._gain(trial) == 0.0
        quantiles = torch.where(waiting, tried[gains.argmax(dim=0)], 0.0)
        return self._search_with_theta(quantiles, self._settings.longest)

    def _search_with_theta(self, quantiles: torch.Tensor, length: int) -> Trial:
        """A trial of the heads with a quantile above 0 that could gain from their theta."""
        # A head is served at the longest length, so its theta is read there.
        evaluator = self._evaluator(self._settings.longest)
        theta = evaluator.theta_at(0.0)
        for quantile in quantiles.unique().tolist():
            theta = torch.where(quantiles == quantile, evaluator.theta_at(quantile), theta)
        layer = AtTheta(self._evaluator(length), theta)
        without = self._without_theta[length].sparsity
        heads = (quantiles > 0.0) & (layer.most >= without + HEAD_GAIN)
        start, slope = self._nearest(quantiles, length)
        return self._search(layer, heads, start, slope)

    def _nearest(self, quantiles: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to begin: tau and slope of each head.

        The depth without theta at that length, moved by as much as it moved in the trial with the
        nearest quantile that scored the head.
        """
        without = self._without_theta[length]
        start, slope = _depth(without), without.slope
        nearest = torch.full_like(quantiles, torch.inf)
        for trial in self._theta_trials:
            away = (quantiles - trial.quantile).abs()
            nearer = (trial.tau < 1.0) & (away < nearest)
            moved = _depth(without) + _depth(trial) - _depth(self._without_theta[trial.length])
            start = torch.where(nearer, moved, start)
            slope = torch.where(nearer, trial.slope, slope)
            nearest = torch.where(nearer, away, nearest)
        return tau_of(start.clamp_min(MIN_DEPTH)), slope

    def _search(
        self,
        layer: AtTheta,
        heads: torch.Tensor,
        start: torch.Tensor,
        slope: torch.Tensor,
    ) -> Trial:
        search = TauSearch(self._settings.tolerance, start, heads, slope, _NEARNESS, layer.most)
        search.run(layer.score, STEPS)
        self._scorer.count(layer.evaluator, search.evaluations)
        tau = layer.raised(search.estimate())
        sparsity = torch.where(tau < 1.0, layer.sparsity(tau), 0.0).float()
        return Trial(layer.theta, tau, search.slope, sparsity, layer.evaluator.length)


def best_of(without_theta: PerHead, with_theta: Sequence[PerHead]) -> PerHead:
    """The thresholds that each head skips most with; theta is off unless it adds ``HEAD_GAIN``.

    Args:
        without_theta: The heads with theta off.
        with_theta: The same heads under one theta or several.
    """
    candidates = [without_theta, *with_theta]
    value = torch.stack([each.sparsity.float() for each in candidates])
    value[0] += HEAD_GAIN
    choice = value.argmax(dim=0, keepdim=True)
    chosen = {
        name: torch.stack([getattr(each, name) for each in candidates]).gather(0, choice)[0]
        for name, values in vars(without_theta).items()
        if torch.is_tensor(values)
    }
    return replace(without_theta, **chosen)


def _with_quantile(trial: Trial, quantile: float) -> ThetaTrial:
    return ThetaTrial(**vars(trial), quantile=quantile)


def _depth(trial: Trial) -> torch.Tensor:
    return depth_of(trial.tau).clamp_max(_HARD_DEPTH)


def _carried(length: int, shorter: Sequence[Trial]) -> torch.Tensor:
    """Where to begin at a length: depth extrapolated from shorter ones, on a log scale."""
    last = shorter[-1]
    if len(shorter) == 1:
        return tau_of(_depth(last))
    before = shorter[-2]
    ratio = math.log(length / last.length) / math.log(last.length / before.length)
    growth = (_depth(last) - _depth(before)).clamp_min(0.0)
    return tau_of(_depth(last) + _DAMPING * ratio * growth)
