"""What a layer's sparse attention is predicted to take: the objective beside the divergence.

The tuner does not know the machine that will serve. ``vllm_afbs.cost_models`` hands it one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class CostModel(Protocol):
    """Predicts the time of prefill attention."""

    @property
    def source(self) -> str:
        """What the predictions rest on, for people."""

    def seconds(self, head_dim: int, num_heads: int, length: int, density: float) -> float:
        """Time of one layer's attention over a whole prompt, selection included.

        Args:
            head_dim: Size of a head.
            num_heads: Query heads.
            length: Tokens of the prompt.
            density: Share of the causal block products that is computed; 1 is dense attention.
        """


@dataclass(frozen=True)
class AttentionTime:
    """Predicted time of a model's prefill attention over that of dense attention.

    Attributes:
        cost: Predicts a layer.
        head_dim: Size of a head.
        num_heads: Query heads of a layer.
    """

    cost: CostModel
    head_dim: int
    num_heads: int

    def of_layer(self, length: int, density: float) -> float:
        """A layer's ratio at a density."""
        dense = self.cost.seconds(self.head_dim, self.num_heads, length, 1.0)
        return self.cost.seconds(self.head_dim, self.num_heads, length, density) / dense

    def ratio(self, length: int, densities: Sequence[float]) -> float:
        """The ratio of all layers with full attention together.

        Args:
            length: Tokens of the prompt.
            densities: Each layer's; 1 for a layer that runs dense.
        """
        return sum(self.of_layer(length, density) for density in densities) / len(densities)
