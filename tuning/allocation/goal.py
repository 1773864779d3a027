"""What a user may ask of the whole model, and when it is reached."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from vllm_afbs.profile.tuner_run import WholeModel
from vllm_afbs.tuning.allocation.acceptance import CONFIDENCE, Increase
from vllm_afbs.tuning.allocation.analytic import Analytic, Division

_SPARSITY_SLACK = 0.01
"""Sparsity, or share of the time ratio, beyond the wanted one that is not worth another attempt,
whatever the model."""
_LEAST_USED = 0.8
"""Share of an allowed damage: using less is worth another attempt."""
_AIM = 0.9
"""Share of the allowed damage that an attempt aims at: midway between ``_LEAST_USED`` and 1."""
_MOVES = (0.2, 5.0)
"""Bounds of a budget's change: a larger miss says little about how far to go."""

GoalKind = Literal["sparsity", "speedup", "perplexity", "kl"]
OPTIONS: dict[GoalKind, str] = {
    "sparsity": "--target-sparsity",
    "speedup": "--target-speedup",
    "perplexity": "--max-perplexity-increase",
    "kl": "--max-kl",
}


class Measured(NamedTuple):
    """What a candidate was measured to do.

    Attributes:
        whole: The whole model, on held-out text.
        time_ratio: Predicted time of its attention at the longest length over that of dense.
    """

    whole: WholeModel
    time_ratio: float


@dataclass(frozen=True)
class Goal:
    """What the whole model is to reach.

    Attributes:
        kind: ``sparsity``: skip at least ``value`` of the block products. ``speedup``: have
            attention at the longest length predicted at least ``value`` times as fast. Both with
            the least damage. ``perplexity``: let perplexity grow by at most ``value``. ``kl``: let
            predictions diverge by at most ``value`` nats. Both in the least time.
        value: A ratio, or nats.
    """

    kind: GoalKind
    value: float

    @property
    def wants_speed(self) -> bool:
        """Whether the goal says how fast, and not how exact."""
        return self.kind in ("sparsity", "speedup")

    def reached(self, measured: Measured) -> float:
        """What a measurement says of the goal, in ``value``'s unit.

        A worse model may predict one text better by luck, so the increase in perplexity counts as
        at least what the KL divergence from the dense predictions implies.
        """
        whole = measured.whole
        if self.kind == "sparsity":
            return whole.sparsity
        if self.kind == "speedup":
            return 1.0 / measured.time_ratio
        if self.kind == "kl":
            return whole.kl
        grown = whole.perplexity / whole.dense_perplexity
        return max(grown, math.exp(whole.kl)) - 1.0

    def allows(self, reached: float) -> bool:
        """Whether the goal is reached."""
        return reached >= self.value if self.wants_speed else reached <= self.value

    def is_met_closely(self, reached: float) -> bool:
        """Whether the goal is reached and another attempt could gain little."""
        if self.kind == "sparsity":
            return self.value <= reached <= self.value + _SPARSITY_SLACK
        if self.kind == "speedup":
            return self.value <= reached <= self.value * (1.0 + 2.0 * _SPARSITY_SLACK)
        return _LEAST_USED * self.value <= reached <= self.value

    def prefers(self, one: Measured, other: Measured) -> bool:
        """Whether one measurement is better than another; the goal allows both."""
        if self.wants_speed:
            return one.whole.kl < other.whole.kl
        return one.time_ratio < other.time_ratio

    def first_budget(self) -> float:
        """The first attempt's budget: a sparsity, a time ratio, or a KL divergence in nats."""
        if self.kind == "sparsity":
            return self.value + _SPARSITY_SLACK / 2
        if self.kind == "speedup":
            return (1.0 - _SPARSITY_SLACK) / self.value
        return _AIM * self._damage(self.value)

    def division(self, analytic: Analytic, budget: float) -> Division:
        """The best division of a budget."""
        if self.kind == "sparsity":
            return analytic.within_density(1.0 - budget)
        if self.kind == "speedup":
            return analytic.within_time(budget)
        return analytic.within_damage(budget)

    def next_budget(self, budget: float, reached: float) -> float:
        """The budget, moved by as much as the goal was missed."""
        if self.kind == "sparsity":
            return budget + self.value + _SPARSITY_SLACK / 2 - reached
        if self.kind == "speedup":
            return budget + (1.0 - _SPARSITY_SLACK) / self.value - 1.0 / reached
        factor = _AIM * self._damage(self.value) / max(self._damage(reached), 1e-12)
        return budget * min(max(factor, _MOVES[0]), _MOVES[1])

    def _damage(self, value: float) -> float:
        """A value of the goal as a KL divergence, in nats."""
        return value if self.kind == "kl" else math.log1p(value)

    def missed(self, reached: Sequence[float]) -> str:
        """The message for a user whose goal no attempt reached."""
        option = OPTIONS[self.kind]
        if self.wants_speed:
            return (
                f"{option}: {self.value:g} expected, {max(reached):.4f} was reached; give a lower "
                "one"
            )
        return (
            f"{option}: {self.value:g} expected at most, {min(reached):.4g} was reached; give a "
            "higher one"
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
