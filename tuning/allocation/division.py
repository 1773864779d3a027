"""Dividing a budget of damage among layers: the least work for the damage that it does.

Each layer has a few choices. A choice has work (predicted time or block products, over those of
dense attention) and a damage, and the damages of layers add up. Given a *price* of damage, each
layer picks its cheapest choice on its own, and no other division with as little damage is less work
(Everett, 1963). So one number, the price, runs through the whole front.
"""

import math
from dataclasses import dataclass

import torch

_HALVINGS = 60
_PRICES = (1e-9, 1e12)


@dataclass(frozen=True)
class Choices:
    """What each layer can be set to.

    Attributes:
        work: Share of the work left, ``[num_layers, num_choices]``, fp64.
        damage: ``[num_layers, num_choices]``, fp64.
    """

    work: torch.Tensor
    damage: torch.Tensor

    def cheapest(self, price: float) -> torch.Tensor:
        """Each layer's cheapest choice at a price of damage, ``[num_layers]``, int64."""
        return (self.work + price * self.damage).argmin(dim=1)

    def mean_work(self, choices: torch.Tensor) -> float:
        """Mean work of a division."""
        return float(self.work.gather(1, choices[:, None]).mean())

    def total_damage(self, choices: torch.Tensor) -> float:
        """Damage of a division."""
        return float(self.damage.gather(1, choices[:, None]).sum())

    def within_damage(self, limit: float) -> torch.Tensor:
        """The division on the front of the least work with at most ``limit`` damage.

        If none has so little, the one with the least damage.
        """
        low, high = _PRICES  # a higher price does less damage
        for _ in range(_HALVINGS):
            price = math.sqrt(low * high)
            within = self.total_damage(self.cheapest(price)) <= limit
            low, high = (low, price) if within else (price, high)
        return self.cheapest(high)

    def within_work(self, limit: float) -> torch.Tensor:
        """The least damaging division on the front with at most ``limit`` mean work.

        If none is so little work, the one of the least.
        """
        low, high = _PRICES
        for _ in range(_HALVINGS):
            price = math.sqrt(low * high)
            within = self.mean_work(self.cheapest(price)) <= limit
            low, high = (price, high) if within else (low, price)
        return self.cheapest(low)
