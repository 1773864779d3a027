"""Regrouping a step's queries into tiles and their results back.

A dense kernel that runs tiles wants each head's query blocks one after another: ``packed`` holds
``[num_heads * num_rows, 1, head_dim]``, head by head, and within a head in the order of
``QueryBlocks``. Selection reads the same rows, so they are pooled on the way.
"""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.impl.torch_selection import BlockStats
from vllm_afbs.kernels.impl.triton_query_block import load_query_block
from vllm_afbs.kernels.impl.triton_scoring import block_self_similarity
from vllm_afbs.kernels.query_blocks import QueryBlocks


def pack_queries(
    query: torch.Tensor, blocks: QueryBlocks, mean_dtype: torch.dtype
) -> tuple[torch.Tensor, BlockStats]:
    """Regroups a step's queries and pools them, reading them once.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``, rows and heads of any stride.
        blocks: The step's query blocks.
        mean_dtype: Dtype of the blocks' means.

    Returns:
        The packed queries, and the statistics of ``blocks.num_blocks`` blocks per head.
    """
    _, num_heads, head_dim = query.shape
    packed = query.new_empty(num_heads * blocks.num_rows, 1, head_dim)
    return packed, _pool(query, packed, blocks, mean_dtype)


def pool_queries_in_place(
    query: torch.Tensor, blocks: QueryBlocks, mean_dtype: torch.dtype
) -> BlockStats:
    """Pools a step's queries without regrouping them; see ``pack_queries``."""
    return _pool(query, None, blocks, mean_dtype)


def _pool(
    query: torch.Tensor, packed: torch.Tensor | None, blocks: QueryBlocks, mean_dtype: torch.dtype
) -> BlockStats:
    _, num_heads, head_dim = query.shape
    mean = query.new_empty(num_heads, blocks.num_blocks, head_dim, dtype=mean_dtype)
    self_similarity = query.new_empty(num_heads, blocks.num_blocks, dtype=torch.float32)
    _pool_block[(blocks.num_blocks, num_heads)](
        query, packed, mean, self_similarity, blocks.table,
        blocks.num_blocks, blocks.num_rows, query.stride(0), query.stride(1),
        **_block_shape(head_dim, blocks),
    )  # fmt: skip
    return BlockStats(mean, self_similarity)


def unpack_output(
    packed: torch.Tensor,
    output: torch.Tensor,
    blocks: QueryBlocks,
    lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Puts packed results back where their queries came from.

    A sink adds ``exp(sink)`` to the softmax's denominator ``exp(lse)`` and nothing to its
    numerator, so a result that was computed without it is multiplied by ``sigmoid(lse - sink)``.

    Args:
        packed: ``[num_heads * num_rows, 1, head_dim]``.
        output: ``[num_tokens, num_heads, head_dim]``; the blocks' rows are written.
        blocks: The step's query blocks.
        lse: Log-sum-exp of each packed row's scores, ``[num_heads * num_rows]``, fp32; read only
            if there are sinks.
        sinks: As in ``StepInputs``.
    """
    _, num_heads, head_dim = output.shape
    _unpack_block[(blocks.num_blocks, num_heads)](
        packed, output, None if sinks is None else lse, sinks, blocks.table,
        blocks.num_blocks, blocks.num_rows, output.stride(0), output.stride(1),
        **_block_shape(head_dim, blocks),
    )  # fmt: skip


def _block_shape(head_dim: int, blocks: QueryBlocks) -> dict[str, int]:
    padded_dim, block = triton.next_power_of_2(head_dim), triton.next_power_of_2(blocks.block_q)
    return {
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "BLOCK": block,
        # Faster than 8 on an H100, where a larger block would not fit 4 warps' registers.
        "num_warps": 4 if block * padded_dim <= 128 * 128 else 8,
    }


@triton.jit
def _places(
    table, num_blocks, num_rows, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A head's block: its addresses in the step and when packed, its packed rows, mask, count."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    first_row, count, _, place, _ = load_query_block(table, num_blocks, index)
    row = tl.arange(0, BLOCK)
    columns = tl.arange(0, PADDED_DIM)
    token = (first_row + row).to(tl.int64)
    at = token[:, None] * stride_token + head * stride_head + columns[None, :]
    packed_row = head.to(tl.int64) * num_rows + place + row
    packed_at = packed_row[:, None] * HEAD_DIM + columns[None, :]
    mask = (row < count)[:, None] & (columns < HEAD_DIM)[None, :]
    return at, packed_at, packed_row, mask, count


@triton.jit(do_not_specialize=["num_blocks", "num_rows"])
def _pool_block(
    query, packed, mean, self_similarity, table, num_blocks, num_rows, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, packed_at, _, mask, count = _places(
        table, num_blocks, num_rows, stride_token, stride_head, HEAD_DIM, PADDED_DIM, BLOCK
    )
    rows = tl.load(query + at, mask=mask, other=0.0)
    if packed is not None:
        tl.store(packed + packed_at, rows, mask=mask)
    out = tl.program_id(1) * num_blocks + tl.program_id(0)
    tl.store(self_similarity + out, block_self_similarity(rows, count))
    columns = tl.arange(0, PADDED_DIM)
    middle = tl.sum(rows.to(tl.float32), 0) / count
    tl.store(mean + out * HEAD_DIM + columns, middle, mask=columns < HEAD_DIM)


@triton.jit(do_not_specialize=["sinks", "num_blocks", "num_rows"])
def _unpack_block(
    packed, output, lse, sinks, table, num_blocks, num_rows, stride_token, stride_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, packed_at, packed_row, mask, count = _places(
        table, num_blocks, num_rows, stride_token, stride_head, HEAD_DIM, PADDED_DIM, BLOCK
    )
    rows = tl.load(packed + packed_at, mask=mask, other=0.0)
    if sinks is not None:
        total = tl.load(lse + packed_row, mask=tl.arange(0, BLOCK) < count, other=0.0)
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32)
        rows = (rows.to(tl.float32) * tl.sigmoid(total - sink)[:, None]).to(rows.dtype)
    tl.store(output + at, rows, mask=mask)
