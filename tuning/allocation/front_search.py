"""The search for divisions that beat the analytic ones: groups of layers, two objectives.

A point of the search is an overall budget and a factor for each group of consecutive layers, on top
of what ``base`` says for that budget. Its predicted time is computed. Its divergence is measured by
a run of the model with real thresholds, at two fidelities:

1. *Low*: one window at a shorter length. The base's own points come first, then a Sobol design,
   then what the optimiser proposes. A reading is taken over the base's at the same fidelity, so it
   says how much better a point is there, and not how long the window was.
2. *High*: more windows at the longest length, for the points on the low front.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.tuning.allocation.analytic import FACTORS, Analytic, Division, groups_of
from vllm_afbs.tuning.allocation.front import Point, front, spread
from vllm_afbs.tuning.allocation.model_runs import ModelRuns
from vllm_afbs.tuning.journal import Result, Steps

if TYPE_CHECKING:
    from vllm_afbs.tuning.allocation.bayes import Optimizer

NUM_GROUPS = 6
"""Groups of layers; between the four and eight that twenty trials can tell apart."""
REACH = 1.0
"""Bound of a group's log2 factor on either side."""
OVERALL = (-1.5, -0.75, 0.0, 0.75, 1.5)
"""Log2 of the budgets of the base's own points, which are the levels without a search."""
NUM_DESIGN, NUM_PROPOSED = 3, 7
"""Points of the Sobol design, and of the optimiser after it."""
NUM_PROMOTED = 4
"""Points of the low front that are measured at high fidelity, beside the base's own."""
_NOISE = 0.1
"""Standard error of a log divergence over the base's, of one window: measured on SmolLM2-135M at
2,048 tokens as the spread between windows."""

Proposer = Literal["ax", "ax, one objective", "random", "coordinate"]
Source = Literal["base", "design", "model"]


@dataclass(frozen=True)
class Fidelity:
    """How a divergence is measured.

    Attributes:
        windows: Which windows.
        length: Tokens of each.
    """

    windows: Sequence[str]
    length: int


@dataclass(frozen=True, eq=False)
class Proposal(Result):
    """A point of the search.

    Attributes:
        parameters: Each group's log2 factor, then the overall budget's log2.
    """

    parameters: tuple[float, ...]


@dataclass(frozen=True)
class Found:
    """A division with what was measured of it.

    Attributes:
        division: Each layer's tolerance.
        point: Predicted time and divergence.
        source: Who proposed it: ``base``, ``design`` or ``model``.
    """

    division: Division
    point: Point
    source: Source


@dataclass
class FrontSearch:
    """A search in progress.

    Args:
        analytic: Predicts time and knows the curves' reach.
        base: The division of a budget, in units of the job's tolerance.
        runs: Runs the model.
        fidelities: The low one and the high one.
        journal: Where proposals are kept.
        seed: Of everything random.
        proposer: Who proposes.
        name: Of the search, in the journal.
    """

    analytic: Analytic
    base: Callable[[float], Division]
    runs: ModelRuns
    fidelities: tuple[Fidelity, Fidelity]
    journal: Steps
    seed: int
    proposer: Proposer = "ax"
    name: str = "front"
    _tried: list[tuple[tuple[float, ...], Point, Source]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._groups = groups_of(list(self.analytic.curves), NUM_GROUPS)

    def run(self) -> list[Found]:
        """Searches, and measures the best at high fidelity; the base's own points come first."""
        low, high = self.fidelities
        zeros = (0.0,) * len(self._groups)
        for overall in OVERALL:
            self._try((*zeros, overall), "base", low)
        for index in range(NUM_DESIGN):
            self._try(self._proposal(index, "design"), "design", low)
        for index in range(NUM_PROPOSED):
            self._try(self._proposal(index, "model"), "model", low)
        found = [
            self._measured(parameters, "base", high)
            for parameters, _, _ in self._tried[: len(OVERALL)]
        ]
        best = front([point for _, point, _ in self._tried])
        others = [self._tried[index] for index in best if index >= len(OVERALL)]
        for index in spread([point for _, point, _ in others], NUM_PROMOTED):
            parameters, _, source = others[index]
            found.append(self._measured(parameters, source, high))
        return found

    def division(self, parameters: tuple[float, ...]) -> Division:
        """The division at a point, each tolerance within the curves' reach."""
        *factors, overall = parameters
        least, most = (self.analytic.tolerance * end for end in (FACTORS[0], FACTORS[-1]))
        of_layer = {
            layer: 2.0**factor
            for group, factor in zip(self._groups, factors, strict=True)
            for layer in group
        }
        return {
            layer: min(max(tolerance * of_layer[layer], least), most)
            for layer, tolerance in self.base(2.0**overall).items()
        }

    def _try(self, parameters: tuple[float, ...], source: Source, fidelity: Fidelity) -> None:
        found = self._measured(parameters, source, fidelity)
        self._tried.append((parameters, found.point, source))

    def _measured(self, parameters: tuple[float, ...], source: Source, fidelity: Fidelity) -> Found:
        division = self.division(parameters)
        kl = self.runs.kl(thresholds_of(self.analytic, division), fidelity.windows, fidelity.length)
        point = Point(self.analytic.time_ratio(division), max(kl, 1e-9))
        return Found(division, point, source)

    def _proposal(self, index: int, stage: str) -> tuple[float, ...]:
        def compute() -> Proposal:
            return Proposal(self._next(index, stage))

        return self.journal.step(f"{self.name} {stage} {index}", Proposal, compute).parameters

    def _next(self, index: int, stage: str) -> tuple[float, ...]:
        if self.proposer == "coordinate":
            return self._coordinate(index + (NUM_DESIGN if stage == "model" else 0))
        if stage == "design":
            return self._optimizer(self.seed).design(NUM_DESIGN)[index]
        if self.proposer == "random":
            return self._optimizer(self.seed).design(NUM_DESIGN + NUM_PROPOSED)[NUM_DESIGN + index]
        return self._optimizer(self.seed + 1 + index).propose()

    def _coordinate(self, index: int) -> tuple[float, ...]:
        """One group's factor moved from the best point so far, each group and direction in turn."""
        best = min(self._tried, key=lambda tried: self._score(tried[1]))[0]
        group, sign = index % len(self._groups), 1.0 if index % 2 == 0 else -1.0
        factors = list(best)
        factors[group] = min(max(factors[group] + sign * 0.5, -REACH), REACH)
        return tuple(factors)

    def _score(self, point: Point) -> float:
        """Log divergence over the base's at the same predicted time."""
        base = [tried for _, tried, _ in self._tried[: len(OVERALL)]]
        return math.log(point.kl) - _at_time(base, point.time_ratio)

    def _optimizer(self, seed: int) -> "Optimizer":
        # Imported here: Ax takes seconds, and a job that is replayed may not need it.
        from vllm_afbs.tuning.allocation.bayes import Optimizer, Space, Trial

        anchor = self._tried[OVERALL.index(0.0)][1]
        noise = _NOISE / math.sqrt(len(self.fidelities[0].windows))
        trials = [
            Trial(parameters, math.log(point.time_ratio), math.log(point.kl / anchor.kl), noise)
            for parameters, point, _ in self._tried
        ]
        base = trials[: len(OVERALL)]
        worst = max(each.log_time for each in base), max(each.log_kl for each in base)
        gained = base[0].log_time - base[-1].log_time
        # The exchange rate of the base's own front: what it pays in divergence for time.
        rate = (base[-1].log_kl - base[0].log_kl) / max(gained, 1e-6)
        weight = rate if self.proposer == "ax, one objective" else None
        space = Space(len(self._groups), REACH, (OVERALL[0], OVERALL[-1]))
        return Optimizer(space, trials, worst, seed, weight)


def thresholds_of(analytic: Analytic, division: Division) -> dict[int, HeadThresholds]:
    """The thresholds of a division, of the layers that the server would run sparse."""
    return {
        layer: analytic.curves[layer].thresholds(tolerance)
        for layer, tolerance in division.items()
        if analytic.is_sparse(layer, tolerance)
    }


def _at_time(base: Sequence[Point], time_ratio: float) -> float:
    """Log divergence of a front at a time, on the line between two of its points."""
    points = sorted((point.time_ratio, math.log(point.kl)) for point in base)
    for (before, one), (after, other) in itertools.pairwise(points):
        if time_ratio <= after or after == points[-1][0]:
            share = (time_ratio - before) / max(after - before, 1e-9)
            return one + (other - one) * share
    return points[0][1]
