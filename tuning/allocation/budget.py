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
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import BudgetRun, LayerProfile, WholeModel
from vllm_afbs.tuning.allocation.goal import Goal
from vllm_afbs.tuning.allocation.levels import Levels
from vllm_afbs.tuning.end_to_end import EndToEnd, Predictions
from vllm_afbs.tuning.journal import Journal, Result
from vllm_afbs.tuning.model import InputError, SourceModel
from vllm_afbs.tuning.progress import Progress
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.windows import CALIBRATION

FACTORS = [2.0 ** (step / 2) for step in range(-6, 7)]
"""A layer's tolerance, in units of the job's: 1/8 to 8, as far as slopes are extrapolated. Chosen
on SmolLM2-135M at lengths of 1024 and 2048."""
ATTEMPTS = 4
"""Most allocations that are measured; each tunes all layers again. Chosen on SmolLM2-135M."""

Layers = dict[int, LayerProfile]


@dataclass(frozen=True, eq=False)
class Damage(Result):
    """What one sparse layer does to the predictions on the shortest length.

    Attributes:
        kl: KL divergence from the dense model's predictions, in nats.
    """

    kl: float


class Search(Protocol):
    """Tunes layers."""

    def tuned(self, tolerances: Mapping[int, float]) -> Layers:
        """Tunes all layers of the job, to the job's tolerance or to their own."""

    def of_layer(self, layer: int) -> LayerSearch:
        """The search over a tuned layer, to ask it more."""


class BudgetSearch:
    """The outer search over one model.

    Args:
        model: The model.
        settings: The job's settings.
        windows: Token ids of the calibration window and of every held-out one.
        journal: Where steps are kept.
        search: Tunes layers.
        progress: Is told how far the search is.
    """

    def __init__(
        self,
        model: SourceModel,
        settings: SearchSettings,
        windows: Mapping[str, list[int]],
        journal: Journal,
        search: Search,
        progress: Progress,
    ) -> None:
        self._model = model
        self._settings = settings
        self._windows = windows
        self._held_out = [name for name in windows if name != CALIBRATION]
        self._journal = journal
        self._search = search
        self._progress = progress

    def run(self, goal: Goal, uniform: Layers) -> tuple[Layers, BudgetRun]:
        """Finds the tolerances, or replays how they were found.

        Args:
            goal: What is wanted.
            uniform: The layers, tuned to the job's tolerance.

        Returns:
            The layers, each tuned to its own tolerance, and how the whole model did with them.

        Raises:
            InputError: No attempt reached the goal.
        """
        before = self.whole_model("uniform", uniform)
        levels = self._levels(list(uniform), before.kl)
        budget, reached = goal.first_budget(), []
        best: tuple[Layers, WholeModel] | None = None
        tried: list[dict[int, float]] = []
        while len(tried) < ATTEMPTS:
            chosen = goal.allocation(levels, budget).tolist()
            tolerances = {
                layer: self._settings.tolerance * FACTORS[level]
                for layer, level in zip(uniform, chosen, strict=True)
            }
            if tolerances in tried:
                break
            tried.append(tolerances)
            self._progress.begin(f"Attempt {len(tried)}", len(uniform))
            layers = self._search.tuned(tolerances)
            after = self.whole_model(f"{goal.kind} {goal.value!r} attempt {len(tried)}", layers)
            reached.append(goal.reached(after))
            if goal.allows(reached[-1]) and (best is None or goal.prefers(after, best[1])):
                best = layers, after
            if goal.is_met_closely(reached[-1]):
                break
            budget = goal.next_budget(budget, reached[-1])
        if best is None:
            raise InputError(goal.missed(reached))
        run = BudgetRun(goal=goal.kind, target=goal.value, uniform=before, allocated=best[1])
        return best[0], run

    @cached_property
    def _runner(self) -> EndToEnd:
        return EndToEnd(self._model, self._settings.block_q, self._settings.block_k)

    @cached_property
    def _dense(self) -> dict[str, Predictions]:
        return {name: self._runner.predict(self._windows[name], {}) for name in self._held_out}

    def whole_model(self, name: str, layers: Layers) -> WholeModel:
        """Runs, or replays, the whole model on the held-out windows.

        Args:
            name: Name of the measurement in the journal.
            layers: The model's layers.
        """

        def measure() -> WholeModel:
            thresholds = _thresholds(layers)
            kls, losses = [], []
            for window, dense in self._dense.items():
                sparse = self._runner.predict(self._windows[window], thresholds)
                kls.append(dense.kl_to(sparse))
                losses.append((dense.loss, sparse.loss))
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
        damage *= kl / damage.sum().clamp_min(1e-12)
        growth = torch.tensor(FACTORS, dtype=torch.float64).square()
        density = 1.0 - torch.tensor(sparsities, dtype=torch.float64)
        return Levels(density, damage[:, None] * growth)

    def _damage(self, layer: int, thresholds: HeadThresholds, error: torch.Tensor) -> float:
        """KL divergence that a layer causes, over its mean squared error; NaN if that is 0."""

        def measure() -> Damage:
            sparse = self._runner.predict(self._shortest, {layer: thresholds})
            return Damage(max(0.0, self._dense_short.kl_to(sparse)))

        kl = self._journal.step(f"damage of layer {layer}", Damage, measure).kl
        square = float(error.double().square().mean())
        return kl / square if square > 0.0 else math.nan

    @property
    def _shortest(self) -> list[int]:
        return self._windows[CALIBRATION][: self._settings.lengths[0]]

    @cached_property
    def _dense_short(self) -> Predictions:
        return self._runner.predict(self._shortest, {})


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
