"""The tuner's ``CostModel``s: a measured card's, and this project's kernels on CPUs."""

from dataclasses import dataclass

import torch

from vllm_afbs.backends.cuda.dispatch import LayerKind, measurements, prefill_seconds
from vllm_afbs.tuning.cost import CostModel

_SECONDS_PER_SCORE = 2.66e-8 / 9
"""Dense attention at 8,192 tokens over tokens squared, of one head of 64."""
_SELECTION = (2.75e-6 / 9, 1.82e-10 / 9)
"""What selection takes a head for each token, and for each token squared."""
_HEAD_DIM = 64


@dataclass(frozen=True)
class CardCost:
    """A kind of card that the dispatcher has measurements of: its fastest kernel's time.

    Attributes:
        card: Its name in ``backends/cuda/measured.json``.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """

    card: str
    block_q: int
    block_k: int

    @property
    def source(self) -> str:
        """See ``CostModel``."""
        return f"measurements of {self.card}"

    def seconds(self, head_dim: int, num_heads: int, length: int, density: float) -> float:
        """See ``CostModel``."""
        kind = LayerKind(head_dim, self.block_q, self.block_k)
        return prefill_seconds(self.card, kind, num_heads, length, density)


@dataclass(frozen=True)
class CpuCost:
    """The kernels on CPUs: products in proportion to the density, and selection.

    The constants are of ``benchmarks/results/prefill_cpu.csv`` (two cores, 9 heads of 64, 2K to
    8K). A machine of another speed has other seconds, but nearly the same ratios.
    """

    @property
    def source(self) -> str:
        """See ``CostModel``."""
        return "block products and selection, as measured on a CPU"

    def seconds(self, head_dim: int, num_heads: int, length: int, density: float) -> float:
        """See ``CostModel``; a layer that would be slower sparse runs dense."""
        size = num_heads * head_dim / _HEAD_DIM
        dense = size * _SECONDS_PER_SCORE * length**2
        if density >= 1.0:
            return dense
        linear, square = _SELECTION
        return min(dense, density * dense + size * (linear * length + square * length**2))


def cost_model(block_q: int, block_k: int) -> CostModel:
    """That of this machine's GPU if it was measured; without one, that of the CPU's kernels.

    Args:
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        own = [card for card in measurements() if card.startswith(f"sm{10 * major + minor}-")]
        if own:
            return CardCost(own[0], block_q, block_k)
    return CpuCost()
