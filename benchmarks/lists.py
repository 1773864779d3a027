"""Random selections of a given density, and the tables that kernels read them from."""

import torch

from vllm_afbs.kernels import (
    BlockGeometry,
    QueryBlocks,
    TileLists,
    TileTables,
    view_steps,
)


def random_blocks(
    num_heads: int, geometry: BlockGeometry, sparsity: float, generator: torch.Generator
) -> torch.Tensor:
    """Draws a selection that skips this share of the causal block products.

    Args:
        num_heads: Query heads; all get the same number of blocks, but not the same blocks.
        geometry: The blocks.
        sparsity: Share to skip. It is reached to within one block, unless the blocks that are
            always kept are already more than the rest.
        generator: Random generator on the device that the selection is made on.
    """
    num_kept = round((1 - sparsity) * geometry.num_visible)
    shape = (num_heads, *geometry.visible.shape)
    device = generator.device
    always, visible = geometry.always.to(device), geometry.visible.to(device)
    priority = torch.rand(shape, generator=generator, device=device).masked_fill_(always, 2.0)
    priority.masked_fill_(~visible, -1.0)
    best = priority.flatten(1).topk(num_kept, dim=1).indices
    keep = torch.zeros(num_heads, visible.numel(), dtype=torch.bool, device=device)
    return keep.scatter_(1, best, True).view(shape) | always


def tile_tables(
    lists: TileLists, blocks: QueryBlocks, key_cache: torch.Tensor, pages: torch.Tensor
) -> TileTables:
    """Turns lists of one request into the block tables that the selector would write.

    Args:
        lists: The tiles' kept blocks, in the order of ``blocks``.
        blocks: The request's query blocks.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``; ``page_size`` divides
            ``block_k`` or is a multiple of it.
        pages: The request's pages, int32.
    """
    num_heads = len(lists.counts) // blocks.num_blocks
    kv_heads = torch.arange(num_heads, device=pages.device) // (num_heads // key_cache.shape[2])
    page_size = key_cache.shape[1]
    part_size = min(page_size, blocks.block_k)
    steps = view_steps(key_cache, part_size)
    parts = torch.arange(0, blocks.block_k, part_size, device=pages.device)
    first_key = lists.block_lists.long()[:, :, None] * blocks.block_k + parts
    first_key = first_key.clamp_max_(len(pages) * page_size - part_size)
    part = first_key % page_size // part_size
    by_head = (pages[first_key // page_size] * steps.page + part * steps.part).view(num_heads, -1)
    block_table = by_head + kv_heads[:, None] * steps.head
    block_table = block_table.to(torch.int32).view(len(lists.counts), -1)
    _, counts, first_positions, places, _ = blocks.table
    last_positions = first_positions + counts - 1
    dropped = last_positions // blocks.block_k + 1 - lists.counts.view(num_heads, -1)
    seq_lens = (last_positions + 1 - dropped * blocks.block_k).to(torch.int32).flatten()
    heads = torch.arange(num_heads + 1, dtype=torch.int32, device=pages.device)
    starts = (heads[:, None] * blocks.num_rows + places).flatten()[: len(lists.counts) + 1]
    return TileTables(starts, seq_lens, block_table)
