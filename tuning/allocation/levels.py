"""The search for a profile's levels, above the layers' curves.

1. *Damage* (``analytic``): one run of the model per layer says what its error costs.
2. *Goal* (``goal_search``), if there is one: the division that reaches it.
3. *Levels*: the analytic divisions at a few budgets around the job's tolerance, from nearly
   lossless to fast. With ``--search ax``, what beats them in a search around them
   (``front_search``).
4. *Measurement*: each level's heads are settled, and the model runs with them on held-out text. A
   level stays only if it is faster than the one before, and diverges more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vllm_afbs.profile.schema import LengthEstimate, mean_calibration
from vllm_afbs.profile.tuner_run import BudgetRun
from vllm_afbs.tuning.allocation.acceptance import AcceptanceTest
from vllm_afbs.tuning.allocation.analytic import (
    Analytic,
    Division,
    measured_damage,
    scaled,
)
from vllm_afbs.tuning.allocation.front import Point, ascending, front, spread
from vllm_afbs.tuning.allocation.front_search import OVERALL, Fidelity, FrontSearch
from vllm_afbs.tuning.allocation.goal import Goal, Measured
from vllm_afbs.tuning.allocation.goal_search import Candidate, GoalSearch
from vllm_afbs.tuning.allocation.model_runs import Layers, ModelRuns, Runs
from vllm_afbs.tuning.cost import AttentionTime
from vllm_afbs.tuning.journal import Steps
from vllm_afbs.tuning.progress import Progress
from vllm_afbs.tuning.search.results import LayerCurves
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.windows import by_text

NAMES = ("nearly-lossless", "careful", "balanced", "fast", "fastest")
DEFAULT = NAMES[OVERALL.index(0.0)]
"""The level at the job's tolerance."""
GOAL = "goal"

SearchKind = Literal["one-tolerance", "analytic", "ax"]
"""How the error is divided among layers; the first runs no model, and makes one level."""


class Search(Protocol):
    """Tunes layers."""

    def settled(self, divisions: Sequence[Division]) -> list[Layers]:
        """All layers as the profile has them, for each division of the error among them."""


@dataclass(frozen=True)
class TunedLevel:
    """A level of the profile.

    Attributes:
        name: Its name.
        tolerance: The tolerance that it began from.
        layers: The tuned layers, each with its own tolerance.
        runs: The whole model's runs with them, on held-out text; None if there were none.
        by_length: What it saves at each calibrated length.
    """

    name: str
    tolerance: float
    layers: Layers
    runs: Runs | None
    by_length: list[LengthEstimate]

    @property
    def point(self) -> Point:
        """Its place on the front, once the model was run with it."""
        assert self.runs is not None
        return Point(self.by_length[-1].attention_time_ratio or 1.0, self.runs.whole.kl)


@dataclass(frozen=True)
class Windows:
    """Names of the windows that the whole model runs over.

    Attributes:
        held_out: Those that layers are validated on.
        unseen: Those that nothing else has seen; none unless asked for.
    """

    held_out: tuple[str, ...]
    unseen: tuple[str, ...]


@dataclass(frozen=True)
class LevelSearch:
    """The search over one model.

    Attributes:
        settings: The job's settings.
        runs: Runs the model.
        search: Tunes layers.
        curves: The layers' curves.
        time: Predicts attention's time.
        windows: What the model runs over.
        journal: Where proposals are kept.
        progress: Is told how far the search is.
        num_dense: Layers with full attention that were not tuned.
        level_length: Tokens of the windows that levels are measured on.
    """

    settings: SearchSettings
    runs: ModelRuns
    search: Search
    curves: Mapping[int, LayerCurves]
    time: AttentionTime
    windows: Windows
    journal: Steps
    progress: Progress
    num_dense: int
    level_length: int

    def run(
        self, kind: SearchKind, goal: Goal | None, acceptance: AcceptanceTest | None
    ) -> tuple[list[TunedLevel], str, BudgetRun | None]:
        """Finds the levels, or replays how they were found.

        Args:
            kind: How the error is divided among layers.
            goal: What is wanted; None to keep to the job's tolerance.
            acceptance: What a promise about perplexity has to pass.

        Returns:
            The levels, from nearly lossless to fast; the name of the default one; and how the goal
            was reached.

        Raises:
            InputError: The goal was not reached, or its perplexity not accepted.
        """
        settings = self.settings
        if kind == "one-tolerance":
            (layers,) = self.search.settled([dict.fromkeys(self.curves, settings.tolerance)])
            estimates = self.estimates(layers)
            return (
                [TunedLevel(DEFAULT, settings.tolerance, layers, None, estimates)],
                DEFAULT,
                None,
            )
        self.progress.begin("Measuring each layer's damage", len(self.curves))
        damage = measured_damage(self.runs, self.curves, settings.lengths[0])
        analytic = Analytic(settings.tolerance, settings.longest, self.curves, self.time, damage)
        found, budget = None, None
        if goal is not None:
            found, budget = self._reach(goal, analytic, acceptance)
        if kind == "ax":
            divisions = self._searched(analytic)
        else:
            divisions = [analytic.divided(2.0**overall) for overall in OVERALL]
        windows = self._level_windows(on_all=goal is not None)
        levels = self._measured(analytic, divisions, windows)
        if found is None:
            return _chain(levels, DEFAULT), DEFAULT, None
        runs = self._runs(found.layers, windows)
        levels.append(self._level(GOAL, analytic, found.division, found.layers, runs))
        return _chain(levels, GOAL), GOAL, budget

    def _reach(
        self, goal: Goal, analytic: Analytic, acceptance: AcceptanceTest | None
    ) -> tuple[Candidate, BudgetRun]:
        """The division that reaches a goal."""
        uniform = analytic.one_tolerance(1.0)
        self.progress.begin("Measuring one tolerance", len(self.windows.held_out))
        (layers,) = self.search.settled([uniform])
        before = self._runs(layers, self.windows.held_out).whole
        analytic = scaled(analytic, before.kl, uniform)
        searched = GoalSearch(goal, analytic, self._candidate, self.progress, self.runs)
        candidate, accepted = searched.run(acceptance)
        return candidate, BudgetRun(
            goal=goal.kind,
            target=goal.value,
            uniform=before,
            allocated=candidate.runs.whole,
            acceptance=accepted,
        )

    def _candidate(self, budget: float, division: Division) -> Candidate:
        (layers,) = self.search.settled([division])
        runs = self._runs(layers, self.windows.held_out)
        ratio = self.estimates(layers)[-1].attention_time_ratio
        return Candidate(budget, division, layers, runs, Measured(runs.whole, ratio or 1.0))

    def _searched(self, analytic: Analytic) -> list[Division]:
        """The front of the search around the analytic divisions."""
        lengths, held_out = self.settings.lengths, self.windows.held_out
        low, high = Fidelity(held_out[:1], lengths[-2]), Fidelity(held_out, lengths[-1])
        self.progress.begin("Searching divisions", 24)
        searched = FrontSearch(
            analytic, analytic.divided, self.runs, (low, high), self.journal, self.settings.seed
        ).run()
        base = searched[: len(OVERALL)]
        best = [searched[index] for index in front([each.point for each in searched])]
        # The budget of the default level stays, for what is promised without a search.
        default = base[OVERALL.index(0.0)]
        slower = [each for each in best if each.point.kl < default.point.kl]
        faster = [each for each in best if each.point.kl >= default.point.kl and each != default]
        two = [slower[i] for i in spread([each.point for each in slower], 2)]
        others = [faster[i] for i in spread([each.point for each in faster], 2)]
        chosen = [*two, default, *others]
        if len(chosen) < len(OVERALL):
            return [each.division for each in base]
        return [each.division for each in chosen]

    def _level_windows(self, on_all: bool) -> tuple[str, ...]:
        """The windows that all levels are measured on, so that they can be compared.

        Args:
            on_all: Whether to take all held-out windows. If not, one of each text: without a goal,
                a job should stay short.
        """
        if self.windows.unseen or on_all:
            return self.windows.unseen or self.windows.held_out
        return tuple(group[0] for group in by_text(self.windows.held_out))

    def _measured(
        self, analytic: Analytic, divisions: Sequence[Division], windows: Sequence[str]
    ) -> list[TunedLevel]:
        """Settles divisions and runs the model with them."""
        self.progress.begin("Measuring levels", len(divisions) * len(windows))
        settled = self.search.settled(divisions)
        return [
            self._level(name, analytic, division, layers, self._runs(layers, windows))
            for name, division, layers in zip(NAMES, divisions, settled, strict=True)
        ]

    def _runs(self, layers: Layers, windows: Sequence[str]) -> Runs:
        return self.runs.whole_model(layers, windows, self.level_length)

    def _level(
        self,
        name: str,
        analytic: Analytic,
        division: Division,
        layers: Layers,
        runs: Runs,
    ) -> TunedLevel:
        # The one tolerance that would do as much damage, by the analytic law.
        share = analytic.total(division) / max(analytic.total(analytic.one_tolerance(1.0)), 1e-12)
        tolerance = self.settings.tolerance
        if name in NAMES:
            tolerance *= 2.0 ** OVERALL[NAMES.index(name)]
        elif share > 0.0:
            tolerance *= share**0.5
        return TunedLevel(name, tolerance, layers, runs, self.estimates(layers))

    def estimates(self, layers: Layers) -> list[LengthEstimate]:
        """What layers save at each calibrated length."""
        dense = [1.0] * self.num_dense
        by_layer = [
            dict(mean_calibration(layer.heads)) if layer.is_sparse else {}
            for layer in layers.values()
        ]
        found = []
        for length in self.settings.lengths:
            sparsities = [each.get(length, 0.0) for each in by_layer] + [0.0] * self.num_dense
            densities = [1.0 - each.get(length, 0.0) for each in by_layer] + dense
            found.append(
                LengthEstimate(
                    length=length,
                    sparsity=sum(sparsities) / len(sparsities),
                    attention_time_ratio=self.time.ratio(length, densities),
                )
            )
        return found


def _chain(levels: list[TunedLevel], default: str) -> list[TunedLevel]:
    """The levels of which each is faster and diverges more than the one before."""
    keep = next(index for index, level in enumerate(levels) if level.name == default)
    return [levels[index] for index in ascending([level.point for level in levels], keep)]
