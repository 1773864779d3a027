"""Selections by the exact attention weights: bounds for comparison, too costly to serve."""

from dataclasses import dataclass

import torch

from vllm_afbs.evaluate.methods import Layer, Method, depth, mass_before, ranks, sink
from vllm_afbs.kernels import BlockGeometry

_SLAB_ENTRIES = 1 << 28
"""Attention weights held at a time: 1 GiB."""


def exact_mass(layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
    """Computes the attention mass of every key block, averaged over the query block's rows.

    Returns:
        ``[num_heads, num_q_blocks, num_k_blocks]``, fp32; rows add up to 1.
    """
    query, key = layer.head_queries(), layer.head_keys()
    num_heads, length, _ = query.shape
    mass = query.new_zeros(num_heads, geometry.num_q_blocks, geometry.num_k_blocks)
    rows = torch.arange(length, device=query.device)
    blocks = max(1, _SLAB_ENTRIES // (num_heads * length * geometry.block_q))
    for first in range(0, geometry.num_q_blocks, blocks):
        start = first * geometry.block_q
        stop = min(length, (first + blocks) * geometry.block_q)
        scores = query[:, start:stop] @ key[:, :stop].transpose(1, 2)
        scores.masked_fill_(rows[:stop] > rows[start:stop, None], -torch.inf)
        weights = _sum_blocks(torch.softmax(scores, -1), -1, geometry.block_k)
        sums = _sum_blocks(weights, -2, geometry.block_q)
        mass[:, first : first + blocks, : sums.shape[-1]] = sums
    return mass / geometry.row_starts.diff().to(mass.device)[None, :, None]


def _sum_blocks(values: torch.Tensor, dim: int, block: int) -> torch.Tensor:
    """Sums blocks along a dimension, the last one possibly partial."""
    behind = -values.shape[dim] % block
    padding = (0, behind) if dim == -1 else (0, 0, 0, behind)
    padded: torch.Tensor = torch.nn.functional.pad(values, padding)
    return torch.unflatten(padded, dim, (-1, block)).sum(dim)


@dataclass(frozen=True)
class OracleTopK(Method):
    """Keeps the same share of the visible blocks in every row: those of most exact mass.

    The knob is the share.
    """

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        rank = ranks(exact_mass(layer, geometry))
        visible = geometry.visible.sum(-1).to(rank.device)
        return (rank + 0.5) / visible[None, :, None]


@dataclass(frozen=True)
class OracleTopP(Method):
    """Keeps, in every row, the fewest blocks that make up a share of the exact mass.

    The knob is the depth of the share. The first block is always kept, as in the served selector.
    """

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        return sink(depth(mass_before(exact_mass(layer, geometry))))
