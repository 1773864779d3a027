"""Pooling blocks of rows on the device: what ``selection.pool_blocks`` computes."""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.selection import BlockStats


def pool_key_pages(
    key_cache: torch.Tensor, pages: torch.Tensor, geometry: BlockGeometry
) -> BlockStats:
    """Pools a context's keys where they lie in a paged cache.

    Args:
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, any strides but the last.
        pages: The request's pages in the order of its context, int32.
        geometry: The request's blocks.

    Returns:
        Statistics of ``geometry.num_k_blocks`` blocks per KV head.
    """
    _, page_size, num_kv_heads, head_dim = key_cache.shape
    num_blocks = geometry.num_k_blocks
    mean = key_cache.new_empty(num_kv_heads, num_blocks, head_dim, dtype=torch.float32)
    similarity = key_cache.new_empty(num_kv_heads, num_blocks, dtype=torch.float32)
    _pool_key_block[(num_blocks, num_kv_heads)](
        key_cache, pages, mean, similarity, geometry.kv_len, num_blocks,
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=page_size,
        BLOCK=geometry.block_k,
        num_warps=8,
    )  # fmt: skip
    return BlockStats(mean, similarity)


@triton.jit
def pool_rows(
    rows, count, mean, similarity, out, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):  # fmt: skip
    """Stores the mean and the self-similarity of a block's rows; absent rows are zero."""
    values = rows.to(tl.float32)
    norms = tl.sqrt(tl.sum(values * values, 1))
    direction = tl.sum(values / tl.maximum(norms, 1e-12)[:, None], 0) / count
    columns = tl.arange(0, PADDED_DIM)
    tl.store(similarity + out, tl.sum(direction * direction, 0))
    tl.store(mean + out * HEAD_DIM + columns, tl.sum(values, 0) / count, mask=columns < HEAD_DIM)


@triton.jit
def _pool_key_block(
    key_cache, pages, mean, similarity, kv_len, num_blocks,
    stride_page, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    head = tl.program_id(1)
    token = index * BLOCK + tl.arange(0, BLOCK)
    present = token < kv_len
    columns = tl.arange(0, PADDED_DIM)
    page = tl.load(pages + token // PAGE_SIZE, mask=present, other=0).to(tl.int64)
    at = page * stride_page + (token % PAGE_SIZE) * stride_token + head * stride_head
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    rows = tl.load(key_cache + at[:, None] + columns[None, :], mask=mask, other=0.0)
    count = tl.minimum(kv_len - index * BLOCK, BLOCK)
    pool_rows(rows, count, mean, similarity, head * num_blocks + index, HEAD_DIM, PADDED_DIM)
