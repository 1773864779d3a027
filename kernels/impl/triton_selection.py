"""Choosing key blocks on the device; ``selection`` says by which rule.

Nothing here waits for the device: lists are as wide as the context, and how long they are stays
there. The chosen blocks are written as what the attention kernel at hand takes: lists of blocks,
or block tables of tiles.
"""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.impl.torch_selection import MEAN_KEY_SHARE, BlockStats, HeadThresholds
from vllm_afbs.kernels.impl.torch_tiles import TileLists, TileTables, heads_per_page
from vllm_afbs.kernels.impl.triton_query_block import load_query_block
from vllm_afbs.kernels.impl.triton_scoring import key_page_similarity, score_key_pages
from vllm_afbs.kernels.query_blocks import QueryBlocks

_BISECTIONS = 24
"""Halvings of the mass threshold: fp32 has no finer one within a row's largest mass."""


def select_tile_lists(
    queries: BlockStats,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    thresholds: HeadThresholds,
    blocks: QueryBlocks,
    softmax_scale: float,
    num_kept: torch.Tensor,
) -> TileLists:
    """Chooses each tile's key blocks, as ``select_blocks`` does, and lists them.

    Args:
        queries: Statistics of the step's query blocks, ``num_heads`` heads.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, any strides but the last.
        block_table: ``[num_reqs, max_pages]``, int32.
        thresholds: tau and theta of each query head.
        blocks: The step's query blocks.
        softmax_scale: Factor of the scores.
        num_kept: ``[num_heads]`` or longer, int64; the number of each head's kept blocks is added.

    Returns:
        The lists of ``num_heads * blocks.num_blocks`` tiles.
    """
    num_tiles = len(queries.mean) * blocks.num_blocks
    lists = TileLists(
        block_table.new_empty(num_tiles, blocks.max_k_blocks), block_table.new_empty(num_tiles)
    )
    _select(
        queries, key_cache, block_table, thresholds, blocks, softmax_scale, num_kept,
        lists.block_lists, lists.counts, None,
    )  # fmt: skip
    return lists


def select_tile_tables(
    queries: BlockStats,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    thresholds: HeadThresholds,
    blocks: QueryBlocks,
    softmax_scale: float,
    num_kept: torch.Tensor,
) -> TileTables:
    """Does what ``select_tile_lists`` does, and writes block tables for ``tiles.one_head_view``.

    Raises:
        ValueError: The page size does not divide ``block_k``.
    """
    num_tiles = len(queries.mean) * blocks.num_blocks
    pages_per_block = blocks.requests[0].geometry.pages_per_block(key_cache.shape[1])
    tables = TileTables(
        block_table.new_empty(num_tiles + 1),
        block_table.new_empty(num_tiles),
        # A kernel may fetch entries ahead of a tile's end, so what follows names a valid page.
        block_table.new_zeros(num_tiles, blocks.max_k_blocks * pages_per_block),
    )
    _select(
        queries, key_cache, block_table, thresholds, blocks, softmax_scale, num_kept,
        tables.block_table, tables.seq_lens, tables.query_start_loc,
    )  # fmt: skip
    return tables


def _select(
    queries: BlockStats,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    thresholds: HeadThresholds,
    blocks: QueryBlocks,
    softmax_scale: float,
    num_kept: torch.Tensor,
    entries: torch.Tensor,
    lengths: torch.Tensor,
    query_start_loc: torch.Tensor | None,
) -> None:
    num_heads = len(queries.mean)
    _, page_size, num_kv_heads, _ = key_cache.shape
    for index, (request, span) in enumerate(zip(blocks.requests, blocks.slices, strict=True)):
        num_q_blocks, num_k_blocks = span.stop - span.start, request.geometry.num_k_blocks
        pages = block_table[request.table_row]
        likeness = None
        if thresholds.has_guards:
            likeness = key_page_similarity(key_cache, pages, request.geometry)
        mean, total = score_key_pages(queries.mean, key_cache, pages, blocks, index, softmax_scale)
        row = triton.next_power_of_2(num_k_blocks)
        _select_tile[(num_heads * num_q_blocks,)](
            mean, total, queries.similarity, likeness, thresholds.tau, thresholds.theta,
            blocks.table, pages, entries, lengths, query_start_loc, num_kept,
            blocks.num_blocks, blocks.num_rows, span.start, num_q_blocks, num_k_blocks,
            mean.stride(1), entries.stride(0), num_heads, request.geometry.local_keys,
            heads_per_page(key_cache),
            GROUP=num_heads // num_kv_heads,
            BLOCK_K=request.geometry.block_k,
            PAGE_SIZE=page_size,
            ROW=row,
            BISECTIONS=_BISECTIONS,
            SHARE=MEAN_KEY_SHARE,
            # Fastest of 1, 2, 4 and 8 on an H100 for rows of 64 to 1024.
            num_warps=min(max(row // 512, 1), 4),
        )  # fmt: skip


@triton.jit
def _softmax(scores, mask):
    score = tl.load(scores, mask=mask, other=float("-inf"))
    highest = tl.max(score, 0)
    weight = tl.exp(score - tl.where(highest == float("-inf"), 0.0, highest))
    return weight / tl.maximum(tl.sum(weight, 0), 1e-30)


@triton.jit(
    do_not_specialize=[
        "pages", "num_kept", "num_blocks", "num_rows", "first_block", "num_q_blocks",
        "num_k_blocks", "stride_entries", "heads_per_page",
    ]
)  # fmt: skip
def _select_tile(
    mean, total, query_similarity, key_similarity, taus, thetas,
    table, pages, entries, lengths, query_start_loc, num_kept,
    num_blocks, num_rows, first_block, num_q_blocks, num_k_blocks,
    stride_scores, stride_entries, num_heads, local_keys, heads_per_page,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW: tl.constexpr,
    BISECTIONS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head = program // num_q_blocks
    index = first_block + program % num_q_blocks
    tile = head * num_blocks + index
    _, count, first_position, place, _ = load_query_block(table, num_blocks, index)
    last_position = first_position + count - 1
    tau = tl.load(taus + head)
    theta = tl.load(thetas + head)

    blocks = tl.arange(0, ROW)
    visible = (blocks < num_k_blocks) & (blocks * BLOCK_K <= last_position)
    always = (blocks == 0) | ((blocks + 1) * BLOCK_K > first_position + 1 - local_keys)
    if key_similarity is None:
        unlike = blocks < 0
    else:
        likeness = key_similarity + (head // GROUP) * num_k_blocks + blocks
        unlike = tl.load(likeness, mask=visible, other=0.0) < theta
    pooled = visible & ~unlike

    row = program.to(tl.int64) * stride_scores + blocks
    mass = SHARE * _softmax(mean + row, pooled) + (1.0 - SHARE) * _softmax(total + row, pooled)

    # Blocks of at least `low` reach tau; those of at least `high` do not, or hold one block.
    low = tl.sum(mass, 0) * 0.0
    high = tl.max(mass, 0)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        reached = tl.sum(tl.where(mass >= middle, mass, 0.0), 0) >= tau
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    # A mass that underflowed to zero is in no smallest set.
    least = tl.maximum(low, 1e-38)
    keep_all = (tau >= 1.0) | (tl.load(query_similarity + tile) < theta)
    least = tl.where(keep_all, -1.0, least)
    keep = ((pooled & (mass >= least)) | unlike | always) & visible
    kept = keep.to(tl.int32)
    number = tl.sum(kept, 0)
    tl.atomic_add(num_kept + head, number.to(tl.int64), sem="relaxed")

    out = entries + tile.to(tl.int64) * stride_entries
    rank = tl.cumsum(kept, 0) - 1
    if query_start_loc is None:
        tl.store(out + rank, blocks, mask=keep)
        tl.store(lengths + tile, number)
    else:
        PARTS: tl.constexpr = BLOCK_K // PAGE_SIZE
        kv_head = head // GROUP
        for part in tl.static_range(PARTS):
            page_index = blocks * PARTS + part
            here = keep & (page_index * PAGE_SIZE <= last_position)
            page = tl.load(pages + page_index, mask=here, other=0)
            tl.store(out + rank * PARTS + part, page * heads_per_page + kv_head, mask=here)
        # Only whole blocks are dropped: the one that the last row ends in is on the diagonal.
        dropped = last_position // BLOCK_K + 1 - number
        tl.store(lengths + tile, last_position + 1 - dropped * BLOCK_K)
        tl.store(query_start_loc + tile, head * num_rows + place)
        tl.store(query_start_loc + num_heads * num_blocks, num_heads * num_rows)
