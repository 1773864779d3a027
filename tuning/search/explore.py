"""Stage 1 of a layer's search: which guard each head should take, from trials that are rough.

1. *Without a guard*, at every length, shortest first: each head's tau, and how fast its error
   falls with it, carry over to the next length.
2. *Guards*: Ax proposes a guard (through it, each head's theta) and a length. A trial's value is
   what the layer would skip if each head could also stay without the guard. Heads that could not
   skip more under the guard whatever their tau are not scored, and a layer that gained from none
   of the first guards is left alone.
3. *The longest length*: heads that gained try the guard that the model expects to be best there,
   and those that still gain nothing there the one that they gained the most from elsewhere.

A trial stops near the tolerance and reads tau off a line, or takes the largest that skips the same:
the choice of a guard needs no more, and nothing is accepted before stage 2 has measured it. The
sparsity at a tau that was not scored is exact all the same: it takes the selection alone.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_afbs.tuning.journal import Record
from vllm_afbs.tuning.search.bracket import (
    MIN_DEPTH,
    START_SLOPE,
    AtTheta,
    TauSearch,
    depth_of,
    tau_of,
)
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.windows import CALIBRATION

if TYPE_CHECKING:
    from vllm_afbs.tuning.search.bayes import LayerOptimizer

EXPLORE_Q_BLOCKS = 16
"""Query blocks scored while exploring, at every length: rows are a fidelity too."""
INITIAL_GUARDS = 2
MAX_GUARDS = 5
HEAD_GAIN = 0.02
"""Sparsity that a guard must add to a head: less is within what a trial's reading is off by, and
held-out text does not confirm it."""
LAYER_GAIN = 0.01
"""Sparsity that a guard must add to the heads' mean for Ax to go on."""
STEPS = 2
START_TAU = 0.93
"""For every layer: to start where the layer before ended saves nothing (11.0 and 12.5 evaluations a
head in two samples of SmolLM2, against 11.2 and 12.2), and would tie layers together."""
_NEARNESS = 0.3  # in log error; over it log error is a line
_HARD_DEPTH = 6.0  # where a head begins that skipped nothing in the trial it carries over from
_DAMPING = 0.7  # depth grows less from each length to the next


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
        step: Callable[[str, Callable[[], Record]], Record],
        on_progress: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._layer = layer
        self._scorer = scorer
        self._step = step
        self._on_progress = on_progress
        self._free: dict[int, Record] = {}  # the trials without a guard, by length
        self._guarded: list[Record] = []
        self._trials = 0
        self._most_trials = len(settings.lengths) + MAX_GUARDS + 2

    def run(self) -> Record:
        """Runs or replays the trials.

        Returns:
            Each head's ``theta``, and at it ``tau``, ``slope`` and ``sparsity``, from the trial at
            the longest length that is ``best_of`` all; as ``free``, the trial without a guard.
        """
        lengths = self._settings.lengths
        for length in lengths:
            name = f"unguarded {length}"
            self._free[length] = self._trial(name, partial(self._without_guard, length))
        while len(self._guarded) < MAX_GUARDS:
            trial = self._trial(
                f"trial {len(self._guarded)}", lambda: self._with_guard(self._propose())
            )
            if trial["guard"] is None:
                break
            self._guarded.append(trial)
        best = self._trial("target best", self._with_best_guard)
        if best["guard"] is not None:
            self._guarded.append(best)
        own = self._trial("target own", self._with_own_guards)
        self._on_progress(1.0 - self._trials / self._most_trials)
        free = self._free[lengths[-1]]
        return {**best_of(free, [*self._at_longest(), own]), "free": free}

    def without_guard(self, length: int) -> Record:
        """The trial without a guard at a length, once ``run`` has been called."""
        return self._free[length]

    def _trial(self, name: str, compute: Callable[[], Record]) -> Record:
        trial = self._step(name, compute)
        self._trials += 1
        self._on_progress(1.0 / self._most_trials)
        return trial

    def _evaluator(self, length: int) -> LayerEvaluator:
        return self._scorer.evaluator(CALIBRATION, length, EXPLORE_Q_BLOCKS)

    def _without_guard(self, length: int) -> Record:
        evaluator = self._evaluator(length)
        theta = evaluator.guard_theta(0.0)
        start, slope = torch.full_like(theta, START_TAU), torch.full_like(theta, START_SLOPE)
        if shorter := list(self._free.values()):
            start, slope = _carried(length, shorter), torch.tensor(shorter[-1]["slope"])
        everyone = torch.ones(len(theta), dtype=torch.bool)
        layer = AtTheta(evaluator, theta)
        return {"guard": 0.0, **self._search(layer, everyone, start, slope)}

    # Guards

    def _propose(self) -> tuple[float, int] | None:
        if len(self._guarded) < INITIAL_GUARDS:
            return self._optimizer().initial()
        if max(float(self._gain(trial).mean()) for trial in self._guarded) < LAYER_GAIN:
            return None
        return self._optimizer().propose()

    def _optimizer(self) -> "LayerOptimizer":
        # Imported here: Ax takes seconds, and a job that is replayed may not need it.
        from vllm_afbs.tuning.search.bayes import LayerOptimizer, Observation

        observations = []
        for trial in [*self._free.values(), *self._guarded]:
            without = torch.tensor(self._free[trial["length"]]["sparsity"])
            value = float((without + self._gain(trial)).mean())
            observations.append(Observation(trial["guard"], trial["length"], value))
        sampling = len(self._guarded) < INITIAL_GUARDS
        seed = self._settings.seed * 100_003 + self._layer * 101
        return LayerOptimizer(
            self._settings.lengths, observations, seed if sampling else seed + len(self._guarded)
        )

    def _gain(self, trial: Record) -> torch.Tensor:
        """What each head skips more than without a guard at that length; 0 if not enough."""
        without = torch.tensor(self._free[trial["length"]]["sparsity"])
        gain = torch.tensor(trial["sparsity"]) - without
        return torch.where(gain >= HEAD_GAIN, gain, 0.0)

    def _at_longest(self) -> list[Record]:
        return [trial for trial in self._guarded if trial["length"] == self._settings.longest]

    def _with_best_guard(self) -> Record:
        gained = torch.stack([self._gain(trial) > 0.0 for trial in self._guarded]).any(dim=0)
        if not gained.any():
            return {"guard": None}
        guard = self._optimizer().best_guard()
        if guard in [0.0, *(trial["guard"] for trial in self._at_longest())]:
            return {"guard": None}
        guards = torch.where(gained, guard, 0.0)
        return {"guard": guard, **self._guarded_search(guards, self._settings.longest)}

    def _with_own_guards(self) -> Record:
        gains = torch.stack([self._gain(trial) for trial in self._guarded])
        guards = torch.tensor([trial["guard"] for trial in self._guarded])[gains.argmax(dim=0)]
        waiting = gains.amax(dim=0) > 0.0
        for trial in self._at_longest():
            waiting &= self._gain(trial) == 0.0
        return self._guarded_search(torch.where(waiting, guards, 0.0), self._settings.longest)

    def _with_guard(self, point: tuple[float, int] | None) -> Record:
        if point is None:
            return {"guard": None}
        guard, length = point
        guards = torch.full((len(self._free[length]["tau"]),), guard)
        return {"guard": guard, **self._guarded_search(guards, length)}

    def _guarded_search(self, guards: torch.Tensor, length: int) -> Record:
        """A trial of the heads that have a guard, each under its own, and could gain from it."""
        # theta of the longest length, where it is served.
        evaluator = self._evaluator(self._settings.longest)
        theta = evaluator.guard_theta(0.0)
        for guard in guards.unique().tolist():
            theta = torch.where(guards == guard, evaluator.guard_theta(guard), theta)
        layer = AtTheta(self._evaluator(length), theta)
        free = torch.tensor(self._free[length]["sparsity"])
        heads = (guards > 0.0) & (layer.most >= free + HEAD_GAIN)
        start, slope = self._nearest(guards, length)
        return self._search(layer, heads, start, slope)

    def _nearest(self, guards: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to begin: tau and slope of each head.

        The depth without a guard at that length, moved by what it was moved in the trial with the
        nearest guard that scored the head.
        """
        free = self._free[length]
        start, slope = _depth(free), torch.tensor(free["slope"])
        nearest = torch.full_like(guards, torch.inf)
        for trial in self._guarded:
            away = (guards - trial["guard"]).abs()
            nearer = (torch.tensor(trial["tau"]) < 1.0) & (away < nearest)
            moved = _depth(free) + _depth(trial) - _depth(self._free[trial["length"]])
            start = torch.where(nearer, moved, start)
            slope = torch.where(nearer, torch.tensor(trial["slope"]), slope)
            nearest = torch.where(nearer, away, nearest)
        return tau_of(start.clamp_min(MIN_DEPTH)), slope

    def _search(
        self,
        layer: AtTheta,
        heads: torch.Tensor,
        start: torch.Tensor,
        slope: torch.Tensor,
    ) -> Record:
        search = TauSearch(self._settings.tolerance, start, heads, slope, _NEARNESS, layer.most)
        search.run(layer.score, STEPS)
        self._scorer.count(layer.evaluator, search.evaluations)
        tau = layer.raised(search.estimate())
        sparsity = torch.where(tau < 1.0, layer.sparsity(tau), 0.0)
        return {
            "length": layer.evaluator.length,
            "theta": layer.theta.tolist(),
            "tau": tau.tolist(),
            "slope": search.slope.tolist(),
            "sparsity": sparsity.tolist(),
        }


def best_of(free: Record, guarded: Sequence[Record]) -> Record:
    """What each head skips most with; without a guard unless one adds ``HEAD_GAIN``.

    Args:
        free: Without a guard, lists of each head's values by name, among them ``sparsity``.
        guarded: The same under guards.
    """
    records = [free, *guarded]
    value = torch.tensor([record["sparsity"] for record in records])
    value[0] += HEAD_GAIN
    choice = value.argmax(dim=0).tolist()
    return {
        name: [records[index][name][head] for head, index in enumerate(choice)]
        for name, values in free.items()
        if isinstance(values, list)
    }


def _depth(trial: Record) -> torch.Tensor:
    return depth_of(torch.tensor(trial["tau"])).clamp_max(_HARD_DEPTH)


def _carried(length: int, shorter: list[Record]) -> torch.Tensor:
    """Where to begin at a length: depth gone on with from those before, on a log scale."""
    last = shorter[-1]
    if len(shorter) == 1:
        return tau_of(_depth(last))
    before = shorter[-2]
    ratio = math.log(length / last["length"]) / math.log(last["length"] / before["length"])
    growth = (_depth(last) - _depth(before)).clamp_min(0.0)
    return tau_of(_depth(last) + _DAMPING * ratio * growth)
