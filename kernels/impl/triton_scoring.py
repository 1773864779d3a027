"""Scoring paged key blocks on the device, as ``torch_selection.score_blocks`` does."""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.impl.triton_query_block import load_query_block
from vllm_afbs.kernels.query_blocks import QueryBlocks

# Chosen on an H100, at 32K and 128K with heads of 128: the fastest of 64 or 128 rows, 16 or 32
# blocks, 4 or 8 warps and 2 or 3 stages.
_ROWS = 128  # pooled queries of a program
_SPAN = 16  # most key blocks of a program, which keeps its queries meanwhile
_PROGRAMS = 256  # with fewer programs, an H100's 132 processors are not all busy


def score_key_pages(
    mean_query: torch.Tensor,
    key_cache: torch.Tensor,
    pages: torch.Tensor,
    blocks: QueryBlocks,
    request: int,
    softmax_scale: float,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores one request's key blocks where they lie in a paged cache.

    Args:
        mean_query: Means of the step's query blocks, ``[num_heads, num_blocks, head_dim]``.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, any strides but the last.
        pages: The request's pages in the order of its context, int32.
        blocks: The step's query blocks.
        request: Index of the request among those of ``blocks``.
        softmax_scale: Factor of the scores.
        scales: As in ``StepInputs``.

    Returns:
        ``mean`` and ``total`` of ``BlockScores``, undefined where no key is visible; the request's
        query blocks are in the order of ``blocks``. Rows are padded, with the same strides in both.
    """
    geometry, first_block = blocks.requests[request].geometry, blocks.slices[request].start
    num_heads, _, head_dim = mean_query.shape
    _, page_size, num_kv_heads, _ = key_cache.shape
    num_q_blocks, num_k_blocks = geometry.num_q_blocks, geometry.num_k_blocks
    group = num_heads // num_kv_heads
    # Rows of whole vectors, whatever the context: see ``triton_query_block``.
    padded = triton.cdiv(num_k_blocks, _SPAN) * _SPAN
    scores = mean_query.new_empty(2, num_heads, num_q_blocks, padded, dtype=torch.float32)
    mean, total = scores[..., :num_k_blocks]
    row_parts = triton.cdiv(num_q_blocks * group, _ROWS)
    span = _span(num_k_blocks, row_parts * num_kv_heads)
    grid = (row_parts, triton.cdiv(num_k_blocks, span), num_kv_heads)
    _score_key_blocks[grid](
        mean_query, key_cache, pages, mean, total, blocks.table, scales, softmax_scale,
        blocks.num_blocks, first_block, num_q_blocks, geometry.kv_len, mean.stride(1), span,
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        GROUP=group,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_K=geometry.block_k,
        NUM_KV_HEADS=num_kv_heads,
        ROWS=_ROWS,
        SPAN=_SPAN,
        num_warps=4,
        num_stages=2,
    )  # fmt: skip
    return mean, total


def _span(num_k_blocks: int, num_others: int) -> int:
    """Key blocks of a program: fewer where the grid would have fewer than ``_PROGRAMS``.

    Args:
        num_k_blocks: Of the context.
        num_others: Programs for each span of them.
    """
    span = _SPAN
    while span > 1 and triton.cdiv(num_k_blocks, span) * num_others < _PROGRAMS:
        span //= 2
    return span


def key_page_self_similarity(
    key_cache: torch.Tensor, pages: torch.Tensor, geometry: BlockGeometry
) -> torch.Tensor:
    """Self-similarity of a context's key blocks, ``[num_kv_heads, num_k_blocks]``, fp32.

    Args:
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, any strides but the last.
        pages: The request's pages in the order of its context, int32.
        geometry: The request's blocks.
    """
    _, page_size, num_kv_heads, head_dim = key_cache.shape
    num_blocks = geometry.num_k_blocks
    self_similarity = key_cache.new_empty(num_kv_heads, num_blocks, dtype=torch.float32)
    _key_block_self_similarity[(num_blocks, num_kv_heads)](
        key_cache, pages, self_similarity, geometry.kv_len, num_blocks,
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=page_size,
        BLOCK=geometry.block_k,
        num_warps=8,
    )  # fmt: skip
    return self_similarity


@triton.jit
def block_self_similarity(rows, count):
    """Mean pairwise cosine of a block's rows; absent rows are zero."""
    values = rows.to(tl.float32)
    norms = tl.sqrt(tl.sum(values * values, 1))
    direction = tl.sum(values / tl.maximum(norms, 1e-12)[:, None], 0) / count
    return tl.sum(direction * direction, 0)


@triton.jit
def _key_addresses(pages, token, present, stride_page, stride_token, PAGE_SIZE: tl.constexpr):
    page = tl.load(pages + token // PAGE_SIZE, mask=present, other=0).to(tl.int64)
    return page * stride_page + (token % PAGE_SIZE) * stride_token


@triton.jit(
    do_not_specialize=[
        "pages", "scales", "num_blocks", "first_block", "num_q_blocks", "kv_len", "span",
    ]
)  # fmt: skip
def _score_key_blocks(
    mean_query, key_cache, pages, mean, total, table, scales, softmax_scale,
    num_blocks, first_block, num_q_blocks, kv_len, stride_scores, span,
    stride_page, stride_token, stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    # A program's rows are the heads of one group, query block after query block, and past the end
    # the last block again. They see nearly the same keys, so few products are wasted.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kv_head = tl.program_id(2)
    if scales is not None:
        softmax_scale *= tl.load(scales + kv_head) * tl.load(scales + NUM_KV_HEADS + kv_head)
    there = row < num_q_blocks * GROUP
    q_block = tl.minimum(row // GROUP, num_q_blocks - 1)
    head = kv_head * GROUP + row % GROUP
    _, count, first_position, _, _ = load_query_block(table, num_blocks, first_block + q_block)
    end = first_position + count

    columns = tl.arange(0, PADDED_DIM)
    at = (head * num_blocks + first_block + q_block).to(tl.int64) * HEAD_DIM
    query = tl.load(
        mean_query + at[:, None] + columns[None, :],
        mask=there[:, None] & (columns < HEAD_DIM)[None, :],
        other=0.0,
    )
    step = tl.arange(0, SPAN)
    means = tl.zeros([ROWS, SPAN], tl.float32)
    totals = tl.zeros([ROWS, SPAN], tl.float32)
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, tl.cdiv(tl.max(end, 0), BLOCK_K))
    whole = tl.minimum(stop, tl.maximum(tl.min(end, 0) // BLOCK_K, start))
    keys = key_cache + kv_head * stride_head
    for in_part in tl.static_range(2):
        for block in range(whole if in_part else start, stop if in_part else whole):
            middle, weight = _score_key_block(
                query, keys, pages, block, end, kv_len, softmax_scale, stride_page, stride_token,
                in_part, HEAD_DIM, PADDED_DIM, PAGE_SIZE, BLOCK_K,
            )  # fmt: skip
            here = (step == block - start)[None, :]
            means = tl.where(here, middle[:, None], means)
            totals = tl.where(here, weight[:, None], totals)
    out = (head.to(tl.int64) * num_q_blocks + q_block) * stride_scores + start
    mask = there[:, None] & (start + step < stop)[None, :]
    tl.store(mean + out[:, None] + step[None, :], means, mask=mask)
    tl.store(total + out[:, None] + step[None, :], totals, mask=mask)


@triton.jit
def _score_key_block(
    query, keys, pages, block, end, kv_len, softmax_scale, stride_page, stride_token,
    IN_PART: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and log-sum-exp of one block's scores; ``IN_PART`` if a row may see only a part."""
    LOG2E: tl.constexpr = 1.4426950408889634
    token = block * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, PADDED_DIM)
    present = token < kv_len
    address = _key_addresses(pages, token, present, stride_page, stride_token, PAGE_SIZE)
    key = tl.load(
        keys + address[None, :] + columns[:, None],
        mask=present[None, :] & (columns < HEAD_DIM)[:, None],
        other=0.0,
    )
    score = tl.dot(query, key.to(query.dtype)) * (softmax_scale * LOG2E)
    if IN_PART:
        seen = token[None, :] < end[:, None]
        num_seen = tl.minimum(tl.maximum(end - block * BLOCK_K, 1), BLOCK_K)
        middle = tl.sum(tl.where(seen, score, 0.0), 1) / num_seen
        score = tl.where(seen, score, float("-inf"))
        highest = tl.max(score, 1)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
    else:
        middle = tl.sum(score, 1) / BLOCK_K
        highest = tl.max(score, 1)
    weight = tl.sum(tl.exp2(score - highest[:, None]), 1)
    return middle / LOG2E, (highest + tl.log2(weight)) / LOG2E


@triton.jit(do_not_specialize=["pages", "kv_len", "num_blocks"])
def _key_block_self_similarity(
    key_cache, pages, self_similarity, kv_len, num_blocks,
    stride_page, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    head = tl.program_id(1)
    token = index * BLOCK + tl.arange(0, BLOCK)
    present = token < kv_len
    columns = tl.arange(0, PADDED_DIM)
    address = _key_addresses(pages, token, present, stride_page, stride_token, PAGE_SIZE)
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    at = head * stride_head + address[:, None] + columns[None, :]
    rows = tl.load(key_cache + at, mask=mask, other=0.0)
    count = tl.minimum(kv_len - index * BLOCK, BLOCK)
    tl.store(self_similarity + head * num_blocks + index, block_self_similarity(rows, count))
