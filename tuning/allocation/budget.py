"""The outer search: each layer's tolerance, for a goal that is set for the whole model.

The layers need not have equal tolerances: in SmolLM2-135M, the same error changes the predictions
a hundred times as much in one layer as in another. So, after all layers are tuned to one tolerance:

1. *Damage*: the model runs with one layer sparse at a time, at the shortest length and with the
   thresholds that meet the tolerance there. The KL divergence that a layer causes grows with the
   square of its error, and the divergences of layers add up. A run with all layers sparse at the
   longest length scales the sum.
2. *Levels*: what a layer would skip at other tolerances is read off the slopes of stage 2.
3. *Allocation* (``levels``): the tolerances that leave the fewest block products for the damage.
   Kernel time is linear in the block products.
4. *Measurement*: the layers are refined and validated with their tolerances, and the whole model
   runs on held-out text. If it misses the goal, the budget moves by the miss, and step 3 repeats.
5. *Acceptance* (``acceptance``), of a promise about perplexity: the best attempt has to keep it on
   windows that steps 1 to 4 have not seen. If it does not, attempts with less damage follow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from vllm_afbs.captures import CALIBRATION
from vllm_afbs.errors import InputError
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import LayerLevel
from vllm_afbs.profile.tuner_run import Acceptance, BudgetRun, WholeModel
from vllm_afbs.tuning.allocation.acceptance import (
    BACK_OFF,
    CANDIDATES,
    AcceptanceTest,
    Increase,
)
from vllm_afbs.tuning.allocation.goal import Goal
from vllm_afbs.tuning.allocation.levels import Levels
from vllm_afbs.tuning.engine import SparseModel
from vllm_afbs.tuning.journal import Journal, Result
from vllm_afbs.tuning.progress import Progress
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings

FACTORS = [2.0 ** (step / 2) for step in range(-6, 7)]
"""A layer's tolerance, in units of the job's: 1/8 to 8, as far as slopes are extrapolated. Chosen
on SmolLM2-135M at lengths of 1024 and 2048."""
ATTEMPTS = 4
"""Most divisions that the search measures; each tunes all layers again. Chosen on SmolLM2-135M."""

Layers = dict[int, LayerLevel]


@dataclass(frozen=True, eq=False)
class Damage(Result):
    """What one sparse layer does to the predictions on the shortest length.

    Attributes:
        kl: KL divergence from the dense model's predictions, in nats.
    """

    kl: float


@dataclass(frozen=True)
class Division:
    """What a budget is divided by, and the divisions that were tried.

    Attributes:
        goal: What is wanted.
        levels: The levels of each layer.
        layers: The layers' indices, in the order of ``levels``.
        tried: The tolerances of each attempt.
    """

    goal: Goal
    levels: Levels
    layers: Sequence[int]
    tried: list[dict[int, float]] = field(default_factory=list)

    def tolerances(self, budget: float, unit: float) -> dict[int, float]:
        """Each layer's tolerance within a budget, where ``FACTORS`` are in units of ``unit``."""
        chosen = self.goal.allocation(self.levels, budget).tolist()
        return {
            layer: unit * FACTORS[level] for layer, level in zip(self.layers, chosen, strict=True)
        }


class Search(Protocol):
    """Tunes layers."""

    def tuned(self, tolerances: Mapping[int, float]) -> Layers:
        """Tunes all layers of the job, to the job's tolerance or to their own."""

    def of_layer(self, layer: int) -> LayerSearch:
        """The search over a tuned layer, to ask it more."""


@dataclass(frozen=True)
class Candidate:
    """A division of the error among layers that was tuned and measured.

    Attributes:
        budget: What was divided; see ``Goal.first_budget``.
        layers: The layers, each tuned to its own tolerance.
        measured: The whole model with them, on held-out text.
    """

    budget: float
    layers: Layers
    measured: WholeModel


class BudgetSearch:
    """The outer search over one model.

    Args:
        load: Loads the model, when it is first needed.
        settings: The job's settings.
        windows: Token ids of the calibration window and of every held-out one.
        journal: Where steps are kept.
        search: Tunes layers.
        progress: Is told how far the search is.
        acceptance: What a promise about perplexity has to pass; None to promise nothing.
    """

    def __init__(
        self,
        load: Callable[[], SparseModel],
        settings: SearchSettings,
        windows: Mapping[str, list[int]],
        journal: Journal,
        search: Search,
        progress: Progress,
        acceptance: AcceptanceTest | None = None,
    ) -> None:
        self._load = load
        self._settings = settings
        self._windows = windows
        self._held_out = [name for name in windows if name != CALIBRATION]
        self._journal = journal
        self._search = search
        self._progress = progress
        self._acceptance = acceptance

    def run(self, goal: Goal, uniform: Layers) -> tuple[Layers, BudgetRun]:
        """Finds the tolerances, or replays how they were found.

        Args:
            goal: What is wanted.
            uniform: The layers, tuned to the job's tolerance.

        Returns:
            The layers, each tuned to its own tolerance, and how the whole model did with them.

        Raises:
            InputError: No attempt reached the goal, or none was accepted.
        """
        before = self.whole_model("uniform", uniform)
        division = Division(goal, self._levels(list(uniform), before.kl), tuple(uniform))
        chosen, accepted = self._steered(division), None
        if self._acceptance is not None:
            chosen, accepted = self._accepted(self._acceptance, division, chosen)
        run = BudgetRun(
            goal=goal.kind,
            target=goal.value,
            uniform=before,
            allocated=chosen.measured,
            acceptance=accepted,
        )
        return chosen.layers, run

    def _steered(self, division: Division) -> Candidate:
        """The best attempt that reaches the goal on held-out text."""
        goal = division.goal
        budget, reached = goal.first_budget(), []
        best: Candidate | None = None
        while len(division.tried) < ATTEMPTS:
            candidate = self._attempt(division, budget)
            if candidate is None:
                break
            reached.append(goal.reached(candidate.measured))
            if goal.allows(reached[-1]) and (
                best is None or goal.prefers(candidate.measured, best.measured)
            ):
                best = candidate
            if goal.is_met_closely(reached[-1]):
                break
            budget = goal.next_budget(budget, reached[-1])
        if best is None:
            raise InputError(goal.missed(reached))
        return best

    def _accepted(
        self, acceptance: AcceptanceTest, division: Division, candidate: Candidate | None
    ) -> tuple[Candidate, Acceptance]:
        """The first candidate whose bound is within the goal, with less damage each time."""
        goal = division.goal
        refused: list[Increase] = []
        while candidate is not None and len(refused) < CANDIDATES:
            increase = acceptance.increase(
                f"{goal.kind} {goal.value!r} candidate {len(refused) + 1}",
                self._model,
                _thresholds(candidate.layers),
            )
            if increase.bound <= goal.value:
                return candidate, acceptance.record(increase, len(refused) + 1)
            refused.append(increase)
            if len(refused) < CANDIDATES:
                candidate = self._attempt(division, candidate.budget * BACK_OFF)
        raise InputError(goal.refused(refused))

    def _attempt(self, division: Division, budget: float) -> Candidate | None:
        """Tunes and measures the division of a budget; None if it was tried before."""
        goal = division.goal
        tolerances = division.tolerances(budget, self._settings.tolerance)
        if tolerances in division.tried:
            return None
        division.tried.append(tolerances)
        number = len(division.tried)
        self._progress.begin(f"Attempt {number}", len(tolerances))
        layers = self._search.tuned(tolerances)
        measured = self.whole_model(f"{goal.kind} {goal.value!r} attempt {number}", layers)
        return Candidate(budget, layers, measured)

    @cached_property
    def _model(self) -> SparseModel:
        return self._load()

    def whole_model(self, name: str, layers: Layers) -> WholeModel:
        """Runs, or replays, the whole model on the held-out windows.

        Args:
            name: Name of the measurement in the journal.
            layers: The model's layers.
        """

        def measure() -> WholeModel:
            thresholds = _thresholds(layers)
            kls, losses = [], []
            for window in self._held_out:
                compared = self._model.compare(self._windows[window], thresholds)
                kls.append(compared.kl)
                losses.append((compared.dense_loss, compared.loss))
            dense_loss, loss = (sum(side) / len(side) for side in zip(*losses, strict=True))
            return WholeModel(
                sparsity=_mean_sparsity(layers),
                kl=max(0.0, sum(kls) / len(kls)),
                perplexity=math.exp(loss),
                dense_perplexity=math.exp(dense_loss),
            )

        return self._journal.step(f"whole model {name}", WholeModel, measure)

    def _levels(self, layers: list[int], kl: float) -> Levels:
        self._progress.begin("Measuring each layer's damage", len(layers))
        tolerances = [self._settings.tolerance * factor for factor in FACTORS]
        damages, sparsities = [], []
        for layer in layers:
            search = self._search.of_layer(layer)
            damages.append(self._damage(layer, *search.at_shortest()))
            sparsities.append(search.sparsities(tolerances))
            self._progress.advance(1.0)
        damage = torch.tensor(damages, dtype=torch.float64)
        # A layer that drops nothing at the shortest length counts as an average one.
        damage = torch.where(damage.isnan(), damage.nanmean(), damage)
        # If no layer is sparse at the job's tolerance, the shortest length has to do.
        scale = kl / damage.sum().clamp_min(1e-12) if kl > 0.0 else self._settings.tolerance**2
        damage *= scale
        growth = torch.tensor(FACTORS, dtype=torch.float64).square()
        density = 1.0 - torch.tensor(sparsities, dtype=torch.float64)
        return Levels(density, damage[:, None] * growth)

    def _damage(self, layer: int, thresholds: HeadThresholds, error: torch.Tensor) -> float:
        """KL divergence that a layer causes, over its mean squared error; NaN if that is 0."""
        shortest = self._windows[CALIBRATION][: self._settings.lengths[0]]

        def measure() -> Damage:
            return Damage(max(0.0, self._model.compare(shortest, {layer: thresholds}).kl))

        kl = self._journal.step(f"damage of layer {layer}", Damage, measure).kl
        square = float(error.double().square().mean())
        return kl / square if square > 0.0 else math.nan


def _thresholds(layers: Layers) -> dict[int, HeadThresholds]:
    """Thresholds of the layers that the server would run sparse."""
    return {
        index: HeadThresholds.of(layer.heads) for index, layer in layers.items() if layer.is_sparse
    }


def _mean_sparsity(layers: Layers) -> float:
    held_out = [
        head.validation.sparsity if layer.is_sparse and head.validation is not None else 0.0
        for layer in layers.values()
        for head in layer.heads
    ]
    return sum(held_out) / len(held_out)
