"""Dividing a budget of damage among layers: the least work for the damage that it does.

Each layer has a few levels. A level has a density (the share of the work that is left) and a
damage, and the damages of layers add up. Given a *price* of damage, each layer picks its cheapest
level on its own, and no other allocation with as little damage is sparser (Everett, 1963). So one
number, the price, runs through the whole front.
"""

import math
from dataclasses import dataclass

import torch

_HALVINGS = 60
_PRICES = (1e-9, 1e12)


@dataclass(frozen=True)
class Levels:
    """The levels that each layer can be set to.

    Attributes:
        density: Share of the work left, ``[num_layers, num_levels]``, fp64.
        damage: ``[num_layers, num_levels]``, fp64.
    """

    density: torch.Tensor
    damage: torch.Tensor

    def cheapest(self, price: float) -> torch.Tensor:
        """Each layer's cheapest level at a price of damage, ``[num_layers]``, int64."""
        return (self.density + price * self.damage).argmin(dim=1)

    def mean_density(self, levels: torch.Tensor) -> float:
        """Mean density of an allocation."""
        return float(self.density.gather(1, levels[:, None]).mean())

    def total_damage(self, levels: torch.Tensor) -> float:
        """Damage of an allocation."""
        return float(self.damage.gather(1, levels[:, None]).sum())

    def within_damage(self, limit: float) -> torch.Tensor:
        """The sparsest allocation on the front with at most ``limit`` damage.

        If none has so little, the one with the least damage.
        """
        low, high = _PRICES  # a higher price does less damage
        for _ in range(_HALVINGS):
            price = math.sqrt(low * high)
            within = self.total_damage(self.cheapest(price)) <= limit
            low, high = (low, price) if within else (price, high)
        return self.cheapest(high)

    def within_density(self, limit: float) -> torch.Tensor:
        """The least damaging allocation on the front with at most ``limit`` mean density.

        If none is so sparse, the sparsest.
        """
        low, high = _PRICES
        for _ in range(_HALVINGS):
            price = math.sqrt(low * high)
            within = self.mean_density(self.cheapest(price)) <= limit
            low, high = (price, high) if within else (low, price)
        return self.cheapest(low)
