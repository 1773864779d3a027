"""The analytic division of the error among layers: a law, and a few runs of the model.

The layers need not have equal tolerances: in SmolLM2-135M, the same error changes the predictions
several times as much in one layer as in another. The divergence that a layer causes grows with the
square of its error, and the divergences of layers add up. So one run with that layer alone sparse
(or a few consecutive ones), at the shortest length, says what its error costs. What its error and
its time are at any tolerance is read off its curves. ``division`` finds the least time for a budget
of divergence.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_afbs.profile.schema import MIN_LAYER_SPARSITY
from vllm_afbs.tuning.allocation.division import Choices
from vllm_afbs.tuning.allocation.model_runs import ModelRuns
from vllm_afbs.tuning.cost import AttentionTime
from vllm_afbs.tuning.search.results import LayerCurves

FACTORS = tuple(2.0 ** (step / 2) for step in range(-4, 5))
"""A layer's tolerance, in units of the job's: as far as curves are drawn."""

DAMAGE_RUNS = 16
"""Most runs that measure damage: of deeper models, consecutive layers share one and are taken for
alike. A run per layer would take SmolLM2-135M past five minutes on two cores."""
Division = dict[int, float]
"""Each layer's tolerance."""


@dataclass(frozen=True)
class Analytic:
    """What every layer may be set to, and what that costs and gains.

    Attributes:
        tolerance: The job's.
        length: The longest, in tokens.
        curves: The layers' curves.
        time: Predicts attention's time.
        damage: Each layer's divergence over its mean squared error, ``[num_layers]``, fp64.
    """

    tolerance: float
    length: int
    curves: Mapping[int, LayerCurves]
    time: AttentionTime
    damage: torch.Tensor

    def one_tolerance(self, factor: float) -> Division:
        """The same tolerance for all layers, in units of the job's."""
        return dict.fromkeys(self.curves, self.tolerance * factor)

    def divided(self, budget: float) -> Division:
        """The least time for the damage that one tolerance would do.

        Args:
            budget: That tolerance in units of the job's.
        """
        return self._division(self._times.within_damage(self.total(self.one_tolerance(budget))))

    def within_damage(self, limit: float) -> Division:
        """The least time for a damage."""
        return self._division(self._times.within_damage(limit))

    def within_time(self, limit: float) -> Division:
        """The least damage at a predicted time ratio."""
        return self._division(self._times.within_work(limit))

    def within_density(self, limit: float) -> Division:
        """The least damage at a mean density."""
        return self._division(self._densities.within_work(limit))

    def total(self, division: Division) -> float:
        """Predicted damage of a division."""
        squares = [self._read(*each)[1] for each in division.items()]
        return float((self.damage * torch.tensor(squares, dtype=torch.float64)).sum())

    def time_ratio(self, division: Division) -> float:
        """Predicted time of attention at the longest length, over that of dense attention."""
        densities = [self._read(*each)[0] for each in division.items()]
        return self.time.ratio(self.length, densities)

    def is_sparse(self, layer: int, tolerance: float) -> bool:
        """Whether the server would run a layer sparse at a tolerance."""
        return self._read(layer, tolerance)[0] < 1.0

    def _read(self, layer: int, tolerance: float) -> tuple[float, float]:
        """A layer's density, and the mean over heads of its squared error, off its curves.

        A layer that the server would run dense has 1 and 0.
        """
        curves = self.curves[layer]
        depth = curves.depth(tolerance)
        sparsity = float(curves.longest.sparsity_at(depth).mean())
        if sparsity < MIN_LAYER_SPARSITY:
            return 1.0, 0.0
        return 1.0 - sparsity, float(curves.longest.error_at(depth).square().mean())

    @cached_property
    def _times(self) -> Choices:
        densities = self._densities
        times = [
            [self.time.of_layer(self.length, density) for density in layer]
            for layer in densities.work.tolist()
        ]
        return Choices(torch.tensor(times, dtype=torch.float64), densities.damage)

    @cached_property
    def _densities(self) -> Choices:
        tolerances = [self.tolerance * factor for factor in FACTORS]
        read = [[self._read(layer, each) for each in tolerances] for layer in self.curves]
        density, square = torch.tensor(read, dtype=torch.float64).unbind(-1)
        return Choices(density, self.damage[:, None] * square)

    def _division(self, choices: torch.Tensor) -> Division:
        return {
            layer: self.tolerance * FACTORS[choice]
            for layer, choice in zip(self.curves, choices.tolist(), strict=True)
        }


def measured_damage(
    runs: ModelRuns, curves: Mapping[int, LayerCurves], length: int
) -> torch.Tensor:
    """Runs the model with one group of layers sparse at a time; see ``Analytic.damage``.

    Args:
        runs: Runs the model.
        curves: The layers' curves.
        length: The shortest, in tokens.
    """
    damages: list[float] = []
    for group in groups_of(list(curves), DAMAGE_RUNS):
        each = {layer: curves[layer].at_shortest() for layer in group}
        square = sum(square for _, square in each.values())
        thresholds = {layer: found for layer, (found, square) in each.items() if square > 0.0}
        kl = runs.damage(group, thresholds, length) if thresholds else math.nan
        damages += [kl / square if thresholds else math.nan] * len(group)
    damage = torch.tensor(damages, dtype=torch.float64)
    # A layer that drops nothing at the shortest length counts as an average one.
    return torch.where(damage.isnan(), damage.nanmean(), damage).nan_to_num(1.0)


def scaled(analytic: Analytic, kl: float, division: Division) -> Analytic:
    """The same, its damages scaled to what a division was measured to do, in nats."""
    predicted = analytic.total(division)
    scale = kl / predicted if kl > 0.0 and predicted > 0.0 else 1.0
    return Analytic(
        analytic.tolerance, analytic.length, analytic.curves, analytic.time, analytic.damage * scale
    )


def groups_of(layers: Sequence[int], count: int) -> list[list[int]]:
    """Consecutive layers in at most ``count`` groups of nearly equal size."""
    count = min(count, len(layers))
    ends = [len(layers) * index // count for index in range(count + 1)]
    return [list(layers[a:b]) for a, b in itertools.pairwise(ends)]
