"""Sparse prefill over a paged KV cache in one Triton launch.

A tile is one query block of one query head, as in ``tiles``; a program takes one tile, the
longest first, and walks its list of kept key blocks with an online softmax (FlashAttention-2's
loop, arXiv 2307.08691). Blocks that every row sees whole come first and need no mask; the
diagonal ones come last.
"""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.tiles import TileLists
from vllm_afbs.kernels.triton_geometry import block_span

_LOG2E = 1.4426950408889634


def triton_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    pages: torch.Tensor,
    lists: TileLists,
    geometry: BlockGeometry,
    softmax_scale: float,
    *,
    block_n: int = 64,
    num_warps: int = 8,
    num_stages: int = 3,
) -> None:
    """Attends to the kept blocks of one request.

    Args:
        query: ``[q_len, num_heads, head_dim]``.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, any strides.
        value_cache: Like ``key_cache``.
        output: Like ``query``; written.
        pages: The request's pages in the order of its context, int32.
        lists: The tiles' kept blocks; every tile's diagonal blocks are among them.
        geometry: The step's blocks; ``block_q`` and ``block_k`` are powers of two.
        softmax_scale: Factor of the scores.
        block_n: Keys taken at a time; divides ``geometry.block_k``.
        num_warps: Of a program.
        num_stages: Of the load pipeline.
    """
    q_len, num_heads, head_dim = query.shape
    page_size, num_kv_heads = key_cache.shape[1:3]
    # A tile's time is its list's length: the longest go first, or they end last and alone.
    order = lists.counts.argsort(descending=True).to(torch.int32)
    _prefill_tile[(len(order),)](
        query, key_cache, value_cache, output, pages,
        lists.block_lists, lists.counts, order,
        softmax_scale * _LOG2E,
        q_len, geometry.kv_len, geometry.num_q_blocks, lists.block_lists.stride(0),
        query.stride(0), query.stride(1), output.stride(0), output.stride(1),
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        value_cache.stride(0), value_cache.stride(1), value_cache.stride(2),
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=geometry.block_q,
        BLOCK_K=geometry.block_k,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


@triton.jit
def _walk(
    acc, denominator, row_max, q, key_cache, value_cache, pages, block_list, start, stop,
    scale, kv_len, positions, kv_head,
    stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    columns = tl.arange(0, PADDED_DIM)
    in_head = columns < HEAD_DIM
    for step in tl.range(start * PARTS, stop * PARTS):
        first = tl.load(block_list + step // PARTS) * BLOCK_K + (step % PARTS) * BLOCK_N
        keys = first + tl.arange(0, BLOCK_N)
        if BLOCK_N <= PAGE_SIZE:
            page = tl.load(pages + first // PAGE_SIZE, mask=first < kv_len, other=0).to(tl.int64)
            slot = (first % PAGE_SIZE) + tl.arange(0, BLOCK_N)
        else:
            page = tl.load(pages + keys // PAGE_SIZE, mask=keys < kv_len, other=0).to(tl.int64)
            slot = keys % PAGE_SIZE
        key_rows = key_cache + page * stride_kp + slot * stride_kt
        value_rows = value_cache + page * stride_vp + slot * stride_vt
        key_at = key_rows[None, :] + kv_head * stride_kh + columns[:, None]
        value_at = value_rows[:, None] + kv_head * stride_vh + columns[None, :]
        if MASKED:
            k = tl.load(key_at, mask=in_head[:, None] & (keys < kv_len)[None, :], other=0.0)
        elif HEAD_DIM == PADDED_DIM:
            k = tl.load(key_at)
        else:
            k = tl.load(key_at, mask=in_head[:, None], other=0.0)
        scores = tl.dot(q, k)
        if MASKED:
            scores = tl.where(positions[:, None] >= keys[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        # A part of a diagonal block may lie wholly behind a row.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        # Scaled here, where it is one fused multiply-add with the shift.
        weights = tl.exp2(scores * scale - shift[:, None])
        correction = tl.exp2(row_max - shift)
        denominator = denominator * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None]
        if MASKED:
            v = tl.load(value_at, mask=in_head[None, :] & (keys < kv_len)[:, None], other=0.0)
        elif HEAD_DIM == PADDED_DIM:
            v = tl.load(value_at)
        else:
            v = tl.load(value_at, mask=in_head[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc)
        row_max = new_max
    return acc, denominator, row_max


@triton.jit
def _prefill_tile(
    query, key_cache, value_cache, output, pages, block_lists, counts, order, scale,
    q_len, kv_len, num_q_blocks, stride_list,
    stride_qt, stride_qh, stride_ot, stride_oh,
    stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.load(order + tl.program_id(0))
    head = tile // num_q_blocks
    q_block = tile % num_q_blocks
    count = tl.load(counts + tile)
    block_list = block_lists + tile.to(tl.int64) * stride_list

    # Blocks are cut at absolute positions; the step may begin inside the first one.
    block_start, first_position, last_position = block_span(q_block, q_len, kv_len, BLOCK_M)
    positions = block_start + tl.arange(0, BLOCK_M)
    rows = positions - (kv_len - q_len)
    present = (rows >= 0) & (rows < q_len)
    columns = tl.arange(0, PADDED_DIM)
    in_tile = present[:, None] & (columns < HEAD_DIM)[None, :]
    q_at = rows.to(tl.int64)[:, None] * stride_qt + head * stride_qh + columns[None, :]
    q = tl.load(query + q_at, mask=in_tile, other=0.0)

    # Diagonal blocks, which need the mask, end the list: those that end past the first row.
    diagonal = last_position // BLOCK_K - (first_position + 1) // BLOCK_K + 1
    whole = count - diagonal

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    acc, denominator, row_max = _walk(
        acc, denominator, row_max, q, key_cache, value_cache, pages, block_list, 0, whole,
        scale, kv_len, positions, head // GROUP,
        stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
        HEAD_DIM, PADDED_DIM, PAGE_SIZE, BLOCK_K, BLOCK_N, False,
    )  # fmt: skip
    acc, denominator, row_max = _walk(
        acc, denominator, row_max, q, key_cache, value_cache, pages, block_list, whole, count,
        scale, kv_len, positions, head // GROUP,
        stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
        HEAD_DIM, PADDED_DIM, PAGE_SIZE, BLOCK_K, BLOCK_N, True,
    )  # fmt: skip
    result = acc / denominator[:, None]
    o_at = rows.to(tl.int64)[:, None] * stride_ot + head * stride_oh + columns[None, :]
    tl.store(output + o_at, result.to(output.dtype.element_ty), mask=in_tile)
