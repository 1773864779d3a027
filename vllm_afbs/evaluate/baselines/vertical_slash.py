"""Vertical and slash lines: MInference's pattern (arXiv 2407.02490), FlexPrefill's budget."""

from dataclasses import dataclass

import torch

from vllm_afbs.evaluate.methods import Layer, Method, depth, mass_before, sink
from vllm_afbs.kernels import BlockGeometry

GAMMA = 0.9
"""FlexPrefill's default of the share."""


@dataclass(frozen=True)
class VerticalSlash(Method):
    """Keeps the key blocks, and the distances in blocks, that the last query block attends to.

    Both are read off the exact attention of the prompt's last ``block_q`` rows. As in FlexPrefill
    (arXiv 2502.20766, algorithm 2), the fewest lines of each kind that make up a share of the mass
    are kept. FlexPrefill's other pattern, for heads that pooled scores predict, is left out, and
    lines are as wide as a block. The knob is the depth of the share.
    """

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        length = len(layer.query)
        start = max(0, length - geometry.block_q)
        query, key = layer.head_queries()[:, start:], layer.head_keys()
        at = torch.arange(length, device=key.device)
        scores = (query @ key.transpose(1, 2)).masked_fill_(
            at[None, :] > at[start:, None], -torch.inf
        )
        weights = torch.softmax(scores, -1)
        blocks = at // geometry.block_k
        vertical = weights.new_zeros(len(weights), geometry.num_k_blocks)
        vertical.index_add_(1, blocks, weights.mean(1))
        distances = ((at[start:, None] - at[None, :]) // geometry.block_k).clamp_min_(0)
        slash = torch.zeros_like(vertical)
        slash.index_add_(1, distances.flatten(), weights.flatten(1) / weights.shape[1])
        own = (geometry.last_positions // geometry.block_k).to(key.device)
        distance = own[:, None] - torch.arange(geometry.num_k_blocks, device=key.device)[None, :]
        lines = depth(mass_before(slash))[:, distance.clamp_min(0)]
        return sink(torch.minimum(depth(mass_before(vertical))[:, None, :], lines))
