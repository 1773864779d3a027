"""Choosing key blocks on the device; ``thresholds`` states the rule.

Nothing here waits for the device: lists are as wide as the context, and their lengths stay on the
device. The chosen blocks are written as the attention kernel at hand takes them: as lists of
blocks, or as block tables of tiles.
"""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.impl.one_head_view import view_steps
from vllm_afbs.kernels.impl.torch_selection import BlockStats
from vllm_afbs.kernels.impl.triton_packing import pack_queries, pool_queries_in_place
from vllm_afbs.kernels.impl.triton_query_block import load_query_block
from vllm_afbs.kernels.impl.triton_scoring import key_page_self_similarity, score_key_pages
from vllm_afbs.kernels.step import StepInputs
from vllm_afbs.kernels.thresholds import MEAN_KEY_SHARE, HeadThresholds
from vllm_afbs.kernels.tiles import PackedTiles, TileLists, TileTables

_BISECTIONS = 24
"""Halvings of the mass threshold: fp32 has no finer one within a row's largest mass."""


def triton_tile_lists(
    step: StepInputs, thresholds: HeadThresholds, softmax_scale: float, num_kept: torch.Tensor
) -> TileLists:
    """Implements ``api.select_tile_lists``."""
    new = step.block_table.new_empty
    lists = TileLists(new(step.num_tiles, step.blocks.max_k_blocks), new(step.num_tiles))
    queries = pool_queries_in_place(step.query, step.blocks.scored, step.matmul_dtype)
    _select(
        step, queries, thresholds, softmax_scale, num_kept, lists.block_lists, lists.counts, None
    )
    return lists


def triton_tiles(
    step: StepInputs, thresholds: HeadThresholds, softmax_scale: float, num_kept: torch.Tensor
) -> PackedTiles:
    """Implements ``api.select_tiles``."""
    pages_per_block = step.blocks.block_k // step.tile_page_size
    new = step.block_table.new_empty
    # A kernel may fetch entries ahead of a tile's end, so what follows names a valid page.
    entries = step.block_table.new_zeros(step.num_tiles, step.blocks.max_k_blocks * pages_per_block)
    tables = TileTables(new(step.num_tiles + 1), new(step.num_tiles), entries)
    packed, queries = pack_queries(step.query, step.blocks, step.matmul_dtype)
    if step.blocks.pairs is not None:
        queries = pool_queries_in_place(step.query, step.blocks.pairs, step.matmul_dtype)
    _select(
        step, queries, thresholds, softmax_scale, num_kept,
        tables.block_table, tables.seq_lens, tables.query_start_loc,
    )  # fmt: skip
    return PackedTiles(packed, tables)


def _select(
    step: StepInputs,
    queries: BlockStats,
    thresholds: HeadThresholds,
    softmax_scale: float,
    num_kept: torch.Tensor,
    entries: torch.Tensor,
    lengths: torch.Tensor,
    query_start_loc: torch.Tensor | None,
) -> None:
    blocks, scored, num_heads = step.blocks, step.blocks.scored, step.num_heads
    _, page_size, num_kv_heads, _ = step.key_cache.shape
    # Lists need no parts of pages, so pages of any size will do.
    part_size = page_size if query_start_loc is None else step.tile_page_size
    steps = view_steps(step.key_cache, part_size)
    for index, (request, span) in enumerate(zip(blocks.requests, blocks.slices, strict=True)):
        num_q_blocks, num_k_blocks = span.stop - span.start, request.geometry.num_k_blocks
        pages = step.block_table[request.table_row]
        key_self_similarity = None
        if thresholds.has_theta:
            key_self_similarity = key_page_self_similarity(step.key_cache, pages, request.geometry)
        mean, total = score_key_pages(
            queries.mean, step.key_cache, pages, scored, index, softmax_scale, step.scales
        )
        row = triton.next_power_of_2(num_k_blocks)
        _select_tile[(num_heads * num_q_blocks,)](
            mean, total, queries.self_similarity, key_self_similarity,
            thresholds.tau, thresholds.theta,
            blocks.table, pages, entries, lengths, query_start_loc, num_kept,
            blocks.num_blocks, blocks.num_rows, span.start, num_q_blocks, num_k_blocks,
            scored.num_blocks, scored.slices[index].start, mean.shape[1], request.geometry.kv_len,
            mean.stride(1), entries.stride(0), num_heads, request.geometry.local_keys,
            *steps,
            GROUP=num_heads // num_kv_heads,
            SCORED_ROWS=scored.block_q,
            BLOCK_K=request.geometry.block_k,
            PAGE_SIZE=page_size,
            PART_SIZE=part_size,
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
        "num_k_blocks", "num_scored_blocks", "first_scored", "num_scored", "kv_len",
        "stride_entries", "page_step", "head_step", "part_step",
    ]
)  # fmt: skip
def _select_tile(
    mean, total, query_self_similarity, key_self_similarity, taus, thetas,
    table, pages, entries, lengths, query_start_loc, num_kept,
    num_blocks, num_rows, first_block, num_q_blocks, num_k_blocks,
    num_scored_blocks, first_scored, num_scored, kv_len,
    stride_scores, stride_entries, num_heads, local_keys, page_step, head_step, part_step,
    GROUP: tl.constexpr, SCORED_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, PART_SIZE: tl.constexpr, ROW: tl.constexpr,
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
    if key_self_similarity is None:
        below_theta = blocks < 0
    else:
        at = key_self_similarity + (head // GROUP) * num_k_blocks + blocks
        below_theta = tl.load(at, mask=visible, other=0.0) < theta
    pooled = visible & ~below_theta

    # As query blocks, scored blocks go from the request's last to its first.
    scored = (kv_len - 1) // SCORED_ROWS - first_position // SCORED_ROWS
    row = (head.to(tl.int64) * num_scored + scored) * stride_scores + blocks
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
    own = query_self_similarity + head * num_scored_blocks + first_scored + scored
    keep_all = (tau >= 1.0) | (tl.load(own) < theta)
    least = tl.where(keep_all, -1.0, least)
    keep = ((pooled & (mass >= least)) | below_theta | always) & visible
    kept = keep.to(tl.int32)
    number = tl.sum(kept, 0)
    tl.atomic_add(num_kept + head, number.to(tl.int64), sem="relaxed")

    out = entries + tile.to(tl.int64) * stride_entries
    rank = tl.cumsum(kept, 0) - 1
    if query_start_loc is None:
        tl.store(out + rank, blocks, mask=keep)
        tl.store(lengths + tile, number)
    else:
        PARTS: tl.constexpr = BLOCK_K // PART_SIZE
        kv_head = head // GROUP
        for part in tl.static_range(PARTS):
            first_key = blocks * BLOCK_K + part * PART_SIZE
            here = keep & (first_key <= last_position)
            page = tl.load(pages + first_key // PAGE_SIZE, mask=here, other=0)
            part_of_page = first_key % PAGE_SIZE // PART_SIZE
            entry = page * page_step + kv_head * head_step + part_of_page * part_step
            tl.store(out + rank * PARTS + part, entry, mask=here)
        # Only whole blocks are dropped: the one that the last row ends in is on the diagonal.
        dropped = last_position // BLOCK_K + 1 - number
        tl.store(lengths + tile, last_position + 1 - dropped * BLOCK_K)
        tl.store(query_start_loc + tile, head * num_rows + place)
        tl.store(query_start_loc + num_heads * num_blocks, num_heads * num_rows)
