"""Block-sparse attention as block tables for a dense paged kernel.

A *tile* is one query block of one query head. To the platform's dense kernel each tile is a
sequence of its own with one head, whose block table lists only the kept KV pages, in order. The
diagonal pages come last, so bottom-right causal masking does the rest, and nothing of the kernel
changes. Measured: 1/density on CPU, 0.62-0.97 of it with FlashAttention 3 at 128K on an H100.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_afbs.kernels.geometry import BlockGeometry


@dataclass(frozen=True)
class TileLists:
    """Kept key blocks of a request's or a step's tiles, head-major, from selectors to kernels.

    Attributes:
        block_lists: Kept key blocks in ascending order, ``[num_heads * num_q_blocks, longest]``,
            int32; what follows a tile's count is not read.
        counts: Kept blocks of each tile, ``[num_heads * num_q_blocks]``, int32.
    """

    block_lists: torch.Tensor
    counts: torch.Tensor


def build_tile_lists(keep: torch.Tensor) -> TileLists:
    """Turns a mask of kept blocks into ragged lists without a host synchronisation.

    Args:
        keep: ``[num_heads, num_q_blocks, num_k_blocks]`` bool.
    """
    flat = keep.flatten(0, 1)
    counts = flat.sum(-1, dtype=torch.int32)
    # False sorts before True, and a stable sort keeps the order of the context.
    lists = (~flat).to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32)
    return TileLists(lists, counts)


@dataclass(frozen=True)
class TileTables:
    """A batch of single-head sequences for a dense paged kernel, head-major.

    Attributes:
        query_start_loc: ``[num_tiles + 1]``, int32, rows of the regrouped queries.
        seq_lens: Keys of each tile, ``[num_tiles]``, int32.
        block_table: ``[num_tiles, max_pages]``, int32, into the cache seen with one KV head
            (``one_head_view``): entry ``page * heads_per_page + kv_head``. Entries past a tile's
            keys are 0.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


def heads_per_page(cache: torch.Tensor) -> int:
    """Pages of ``one_head_view`` from one page of a cache to the next.

    Where heads lie outside the tokens of a page (HND) that is ``num_kv_heads``. Where they lie
    inside (NHD), pages of the view overlap in memory, and most of its page numbers are never used.
    """
    return cache.stride(0) // _head_stride(cache)


def _head_stride(cache: torch.Tensor) -> int:
    # Of a dimension of one PyTorch lets the stride be anything, which tensor copies do not take.
    return cache.stride(2) if cache.shape[2] > 1 else cache.stride(0)


def one_head_view(cache: torch.Tensor) -> torch.Tensor:
    """Sees a paged cache as one with a single KV head, so that one launch serves all heads.

    Page ``page * heads_per_page(cache) + kv_head`` of the view is KV head ``kv_head`` of page
    ``page``.

    Args:
        cache: ``[num_pages, page_size, num_kv_heads, head_dim]``.

    Returns:
        ``[num_pages * heads_per_page(cache) or less, page_size, 1, head_dim]``, the same memory.

    Raises:
        ValueError: A page is not a whole number of heads' strides long.
    """
    num_pages, page_size, num_kv_heads, head_dim = cache.shape
    stride_page, stride_token, _, stride_column = cache.stride()
    stride_head = _head_stride(cache)
    if stride_page % stride_head:
        raise ValueError(
            f"the cache's page stride must be a multiple of its head stride, got {cache.stride()}"
        )
    return cache.as_strided(
        ((num_pages - 1) * (stride_page // stride_head) + num_kv_heads, page_size, 1, head_dim),
        (stride_head, stride_token, stride_token, stride_column),
    )


DensePagedAttention = Callable[[torch.Tensor, torch.Tensor, TileTables], None]
"""Runs dense causal attention of ``query [num_rows, 1, head_dim]`` into ``output`` (alike)."""


def build_tile_tables(
    lists: TileLists,
    geometry: BlockGeometry,
    pages: torch.Tensor,
    page_size: int,
    num_kv_heads: int,
) -> TileTables:
    """Turns kept blocks into one block table per tile, on the lists' device.

    Args:
        lists: The tiles' kept blocks.
        geometry: The step's blocks.
        pages: The request's row of the block table, at least ``ceil(kv_len / page_size)``, int.
        page_size: Keys of a page; divides ``geometry.block_k``.
        num_kv_heads: KV heads of the cache.

    Returns:
        The tables of ``num_heads * num_q_blocks`` tiles.

    Raises:
        ValueError: ``page_size`` does not divide ``geometry.block_k``.
    """
    pages_per_block = geometry.pages_per_block(page_size)
    device = lists.counts.device
    num_tiles, longest = lists.block_lists.shape
    num_heads = num_tiles // geometry.num_q_blocks
    last_page = -(-geometry.kv_len // page_size) - 1

    # The tables are not cut to the longest list: to know it, the host would have to wait.
    parts = torch.arange(pages_per_block, dtype=torch.int32, device=device)
    index = (lists.block_lists[:, :, None] * pages_per_block + parts).clamp_max_(last_page)
    entries = pages.index_select(0, index.flatten()).to(torch.int32).view(num_heads, -1)
    kv_heads = torch.arange(num_heads, dtype=torch.int32, device=device)
    kv_heads //= num_heads // num_kv_heads
    block_table = (entries * num_kv_heads + kv_heads[:, None]).view(num_tiles, -1)
    place = torch.arange(longest * pages_per_block, dtype=torch.int32, device=device)
    block_table.masked_fill_(place >= lists.counts[:, None] * pages_per_block, 0)

    # Only whole blocks are dropped: the one that the last row ends in is on the diagonal.
    last_positions = geometry.last_positions.to(device, torch.int32)
    num_visible = last_positions // geometry.block_k + 1
    dropped = num_visible - lists.counts.view(num_heads, -1)
    seq_lens = last_positions + 1 - dropped * geometry.block_k
    row_starts = geometry.row_starts[:-1].to(device, torch.int32)
    heads = torch.arange(num_heads, dtype=torch.int32, device=device)
    starts = (heads[:, None] * geometry.q_len + row_starts).flatten()
    query_start_loc = torch.nn.functional.pad(starts, (0, 1), value=num_heads * geometry.q_len)
    return TileTables(query_start_loc, seq_lens.flatten(), block_table)


def tile_prefill(
    query: torch.Tensor,
    output: torch.Tensor,
    tables: TileTables,
    dense_attention: DensePagedAttention,
) -> None:
    """Attends tile by tile through the platform's dense kernel.

    Args:
        query: ``[q_len, num_heads, head_dim]``.
        output: Like ``query``; written.
        tables: The step's tiles.
        dense_attention: The platform's dense paged kernel over the cache with one KV head.
    """
    q_len, num_heads, head_dim = query.shape
    by_head = query.transpose(0, 1).reshape(num_heads * q_len, 1, head_dim)
    regrouped = torch.empty_like(by_head)
    dense_attention(by_head, regrouped, tables)
    output.copy_(regrouped.view(num_heads, q_len, head_dim).transpose(0, 1))
