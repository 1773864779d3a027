"""What a user may ask of the whole model, and when it is reached."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_afbs.profile.tuner_run import WholeModel
from vllm_afbs.tuning.allocation.acceptance import CONFIDENCE, Increase
from vllm_afbs.tuning.allocation.levels import Levels

_SPARSITY_SLACK = 0.01
"""Sparsity above the wanted one that is not worth another attempt, whatever the model."""
_LEAST_USED = 0.8
"""Share of an allowed increase in perplexity: using less is worth another attempt."""
_AIM = 0.9
"""Share of the allowed increase that an attempt aims at: midway between ``_LEAST_USED`` and 1."""
_MOVES = (0.2, 5.0)
"""Bounds of a budget's change: a larger miss says little about how far to go."""


@dataclass(frozen=True)
class Goal:
    """What the whole model is to reach.

    Attributes:
        kind: ``sparsity``: skip at least ``value`` of the block products, with the least damage.
            ``perplexity``: let perplexity grow by at most ``value``, with the most sparsity.
        value: A ratio.
    """

    kind: Literal["sparsity", "perplexity"]
    value: float

    def reached(self, measured: WholeModel) -> float:
        """What a measurement says of the goal, in ``value``'s unit.

        A worse model may predict one text better by luck, so the increase in perplexity counts as
        at least what the KL divergence from the dense predictions implies.
        """
        if self.kind == "sparsity":
            return measured.sparsity
        grown = measured.perplexity / measured.dense_perplexity
        return max(grown, math.exp(measured.kl)) - 1.0

    def allows(self, reached: float) -> bool:
        """Whether the goal is reached."""
        return reached >= self.value if self.kind == "sparsity" else reached <= self.value

    def is_met_closely(self, reached: float) -> bool:
        """Whether the goal is reached and another attempt could gain little."""
        if self.kind == "sparsity":
            return self.value <= reached <= self.value + _SPARSITY_SLACK
        return _LEAST_USED * self.value <= reached <= self.value

    def prefers(self, one: WholeModel, other: WholeModel) -> bool:
        """Whether one measurement is better than another; the goal allows both."""
        return one.kl < other.kl if self.kind == "sparsity" else one.sparsity > other.sparsity

    def first_budget(self) -> float:
        """The first attempt's budget: a sparsity, or a KL divergence in nats."""
        if self.kind == "sparsity":
            return self.value + _SPARSITY_SLACK / 2
        return _AIM * math.log1p(self.value)

    def allocation(self, levels: Levels, budget: float) -> torch.Tensor:
        """The best level of each layer within a budget, ``[num_layers]``, int64."""
        if self.kind == "sparsity":
            return levels.within_density(1.0 - budget)
        return levels.within_damage(budget)

    def next_budget(self, budget: float, reached: float) -> float:
        """The budget, moved by as much as the goal was missed."""
        if self.kind == "sparsity":
            return budget + self.value + _SPARSITY_SLACK / 2 - reached
        factor = _AIM * math.log1p(self.value) / max(math.log1p(reached), 1e-12)
        return budget * min(max(factor, _MOVES[0]), _MOVES[1])

    def missed(self, reached: list[float]) -> str:
        """The message for a user whose goal no attempt reached."""
        if self.kind == "sparsity":
            return (
                f"--target-sparsity: {self.value:g} expected, {max(reached):.4f} was reached; give "
                "a lower one"
            )
        return (
            f"--max-perplexity-increase: {self.value:g} expected at most, {min(reached):.4g} was "
            "reached; give a higher one"
        )

    def refused(self, increases: Sequence[Increase]) -> str:
        """The message for a user whose perplexity was reached, but not proven."""
        least = min(increases, key=lambda each: each.bound)
        return (
            f"--max-perplexity-increase: {self.value:g} expected at most, {least.bound:.4g} was "
            f"reached ({least.measured:.4g} measured): the upper {100 * CONFIDENCE:g} % bound on "
            "windows that the search had not seen; give a higher one, or more or longer "
            "--calibration texts"
        )
