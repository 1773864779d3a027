"""Block selection on the device: four launches, no host synchronisation.

The rule is ``selection``'s. Q and K are read once, to pool them; the pooled scores are one small
matrix product; and one program per tile turns its row of scores into a list of kept blocks. The
smallest set that reaches tau is found by bisecting the mass that a block must have, which needs
no sort: blocks of equal mass are kept or dropped together.
"""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.selection import BlockStats, HeadThresholds
from vllm_afbs.kernels.tiles import TileLists
from vllm_afbs.kernels.triton_geometry import block_span

_BISECTIONS = 30  # of a mass in [0, 1]: to 1e-9, below fp32's rounding of a row's sum


def pool_query_blocks(query: torch.Tensor, geometry: BlockGeometry) -> BlockStats:
    """Pools a step's query rows, as ``selection.pool_queries`` does.

    Args:
        query: ``[q_len, num_heads, head_dim]``.
        geometry: The step's blocks; ``block_q`` is a power of two.
    """
    strides = (0, query.stride(0), query.stride(1))
    return _pool(query, query.shape[1], geometry.num_q_blocks, geometry.block_q,
                 geometry.first_row, geometry.q_len, strides, None, 1)  # fmt: skip


def pool_key_pages(
    key_cache: torch.Tensor, pages: torch.Tensor, geometry: BlockGeometry
) -> BlockStats:
    """Pools a request's keys straight from the paged cache.

    Args:
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, any strides.
        pages: The request's pages in the order of its context, int32.
        geometry: The step's blocks; ``block_k`` is a power of two.
    """
    strides = key_cache.stride()[:3]
    page_size, num_kv_heads = key_cache.shape[1:3]
    return _pool(key_cache, num_kv_heads, geometry.num_k_blocks, geometry.block_k,
                 0, geometry.kv_len, strides, pages, page_size)  # fmt: skip


def select_tile_lists(
    queries: BlockStats,
    keys: BlockStats,
    thresholds: HeadThresholds,
    geometry: BlockGeometry,
    softmax_scale: float,
) -> TileLists:
    """Chooses key blocks as ``selection.select_blocks`` does, as lists.

    Args:
        queries: Statistics of the step's query blocks, ``num_heads`` heads.
        keys: Statistics of the context's key blocks, ``num_kv_heads`` heads.
        thresholds: tau and theta of each query head, on the device.
        geometry: The step's blocks.
        softmax_scale: Factor of the scores.
    """
    num_heads, num_q_blocks, head_dim = queries.mean.shape
    num_kv_heads, num_k_blocks, _ = keys.mean.shape
    by_kv_head = queries.mean.view(num_kv_heads, -1, head_dim)
    scores = by_kv_head @ keys.mean.transpose(1, 2)
    num_tiles = num_heads * num_q_blocks
    device = scores.device
    block_lists = torch.empty(num_tiles, num_k_blocks, dtype=torch.int32, device=device)
    counts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    _select_tile[(num_tiles,)](
        scores, queries.similarity, keys.similarity, thresholds.tau, thresholds.theta,
        block_lists, counts,
        softmax_scale, num_q_blocks, num_k_blocks, geometry.q_len, geometry.kv_len,
        GROUP=num_heads // num_kv_heads,
        BLOCK_Q=geometry.block_q,
        BLOCK_K=geometry.block_k,
        ROW=triton.next_power_of_2(num_k_blocks),
        BISECTIONS=_BISECTIONS,
        num_warps=4,
    )  # fmt: skip
    return TileLists(block_lists, counts)


def _pool(
    rows: torch.Tensor,
    num_heads: int,
    num_blocks: int,
    block: int,
    first_position: int,
    length: int,
    strides: tuple[int, ...],
    pages: torch.Tensor | None,
    page_size: int,
) -> BlockStats:
    head_dim = rows.shape[-1]
    mean = torch.empty(num_heads, num_blocks, head_dim, dtype=torch.float32, device=rows.device)
    similarity = torch.empty(num_heads, num_blocks, dtype=torch.float32, device=rows.device)
    _pool_block[(num_blocks, num_heads)](
        rows, pages, mean, similarity, first_position, length, num_blocks, *strides,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=page_size,
        BLOCK=block,
        PAGED=pages is not None,
        num_warps=4,
    )  # fmt: skip
    return BlockStats(mean, similarity)


@triton.jit
def _pool_block(
    rows, pages, mean, similarity, first_position, length, num_blocks,
    stride_page, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    head = tl.program_id(1)
    # Blocks are cut at absolute positions; the rows may begin inside the first one.
    token = (first_position // BLOCK + index) * BLOCK + tl.arange(0, BLOCK) - first_position
    present = (token >= 0) & (token < length)
    columns = tl.arange(0, PADDED_DIM)
    if PAGED:
        page = tl.load(pages + token // PAGE_SIZE, mask=present, other=0).to(tl.int64)
        at = page * stride_page + (token % PAGE_SIZE) * stride_token
    else:
        at = token.to(tl.int64) * stride_token
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    at = at[:, None] + head * stride_head + columns[None, :]
    values = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)

    count = tl.sum(present.to(tl.float32), 0)
    norms = tl.sqrt(tl.sum(values * values, 1))
    direction = tl.sum(values / tl.maximum(norms, 1e-12)[:, None], 0) / count
    out = head * num_blocks + index
    tl.store(similarity + out, tl.sum(direction * direction, 0))
    tl.store(mean + out * HEAD_DIM + columns, tl.sum(values, 0) / count, mask=columns < HEAD_DIM)


@triton.jit
def _select_tile(
    scores, query_similarity, key_similarity, taus, thetas, block_lists, counts,
    softmax_scale, num_q_blocks, num_k_blocks, q_len, kv_len,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ROW: tl.constexpr,
    BISECTIONS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tile // num_q_blocks
    tau = tl.load(taus + head)
    theta = tl.load(thetas + head)
    _, first_position, last_position = block_span(tile % num_q_blocks, q_len, kv_len, BLOCK_Q)

    blocks = tl.arange(0, ROW)
    visible = (blocks < num_k_blocks) & (blocks * BLOCK_K <= last_position)
    always = (blocks == 0) | ((blocks + 1) * BLOCK_K > first_position + 1)
    likeness = tl.load(
        key_similarity + (head // GROUP) * num_k_blocks + blocks, mask=visible, other=0.0
    )
    unlike = likeness < theta
    pooled = visible & (likeness >= theta)

    row = scores + tile.to(tl.int64) * num_k_blocks
    score = tl.load(row + blocks, mask=pooled, other=float("-inf")) * softmax_scale
    highest = tl.max(score, 0)
    weight = tl.exp(score - tl.where(highest == float("-inf"), 0.0, highest))
    mass = weight / tl.maximum(tl.sum(weight, 0), 1e-30)

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
    place = tl.cumsum(kept, 0) - 1
    tl.store(block_lists + tile.to(tl.int64) * num_k_blocks + place, blocks, mask=keep)
    tl.store(counts + tile, tl.sum(kept, 0))
