"""Selections of a given density."""

import torch

from vllm_afbs.kernels import BlockGeometry


def random_blocks(
    num_heads: int, geometry: BlockGeometry, sparsity: float, generator: torch.Generator
) -> torch.Tensor:
    """Draws a selection that skips this share of the causal block products.

    Args:
        num_heads: Query heads; all share the number of blocks, not the blocks.
        geometry: The blocks.
        sparsity: Share to skip, reached to within one block unless the always-kept ones exceed it.
        generator: Source of the draw.
    """
    num_kept = round((1 - sparsity) * geometry.num_visible)
    shape = (num_heads, *geometry.visible.shape)
    priority = torch.rand(shape, generator=generator).masked_fill_(geometry.always, 2.0)
    priority.masked_fill_(~geometry.visible, -1.0)
    best = priority.flatten(1).topk(num_kept, dim=1).indices
    keep = torch.zeros(num_heads, geometry.visible.numel(), dtype=torch.bool)
    return keep.scatter_(1, best, True).view(shape) | geometry.always
