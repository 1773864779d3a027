"""Sparse prefill over a paged KV cache: a step's requests in one Triton launch.

A tile is one query block of one query head. A program takes one tile and walks its list of kept
key blocks with an online softmax (FlashAttention-2's loop, arXiv 2307.08691). Blocks that every
row sees whole come first and need no mask; the diagonal ones come last.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.impl.triton_query_block import load_query_block
from vllm_afbs.kernels.step import FP8, StepInputs
from vllm_afbs.kernels.tiles import TileLists

CONFIGS = Path(__file__).with_name("triton_configs.json")

_LOG2E = tl.constexpr(1.4426950408889634)
_L2_BYTES = 32 * 2**20
"""L2 cache that heads may fill together: of an H100's 50 MB, what other traffic leaves them.

Chosen for an H100; on another GPU it costs speed, not correctness.
"""


@dataclass(frozen=True)
class LaunchConfig:
    """How a tile is run; none of it changes what is computed.

    Attributes:
        block_n: Keys taken at a time: a divisor of ``block_k``, or two blocks.
        num_warps: Of a program.
        num_stages: Of the load pipeline.
    """

    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class TileShape:
    """What a launch configuration is measured for.

    Attributes:
        head_dim: Size of a head.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """

    head_dim: int
    block_q: int
    block_k: int

    def distance(self, other: "TileShape") -> float:
        """How far another shape's blocks are from this one's, in octaves."""
        ratios = (self.block_q / other.block_q, self.block_k / other.block_k)
        return sum(abs(math.log2(ratio)) for ratio in ratios)


def read_configs(path: Path = CONFIGS) -> dict[TileShape, LaunchConfig]:
    """Reads launch configurations by shape."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {TileShape(**row["shape"]): LaunchConfig(**row["config"]) for row in rows}


@functools.cache
def fastest_config(shape: TileShape) -> LaunchConfig:
    """Chooses by ``triton_configs.json``, from the nearest blocks of the next larger head size.

    ``python -m benchmarks.triton_configs --write`` measures and writes the file.

    Raises:
        ValueError: The head is larger than any that was measured.
    """
    measured = read_configs()
    sizes = {each.head_dim for each in measured}
    fitting = [size for size in sizes if size >= shape.head_dim]
    if not fitting:
        raise ValueError(f"head_dim up to {max(sizes)} expected, got {shape.head_dim}")
    of_size = [each for each in measured if each.head_dim == min(fitting)]
    nearest = min(of_size, key=shape.distance)
    config = measured[nearest]
    most = shape.block_k * max(1, config.block_n // nearest.block_k)
    return dataclasses.replace(config, block_n=min(config.block_n, most))


def triton_prefill(
    step: StepInputs,
    lists: TileLists,
    output: torch.Tensor,
    softmax_scale: float,
    softcap: float,
    config: LaunchConfig | None = None,
) -> None:
    """Implements ``api.sparse_prefill`` in one launch.

    Args:
        step: As there; ``block_q`` and ``block_k`` of its blocks are powers of two.
        lists: As there.
        output: As there.
        softmax_scale: As there.
        softcap: As there.
        config: How to run; None for ``fastest_config``.

    Raises:
        ValueError: ``block_n`` is neither a divisor of ``block_k`` nor twice that.
    """
    blocks, query, block_table = step.blocks, step.query, step.block_table
    key_cache, value_cache = step.key_cache, step.value_cache
    num_heads, head_dim = query.shape[1:]
    page_size, num_kv_heads = key_cache.shape[1:3]
    block_k = blocks.block_k
    config = config or fastest_config(TileShape(head_dim, blocks.block_q, block_k))
    if block_k % config.block_n and config.block_n != 2 * block_k:
        raise ValueError(
            "block_n must divide block_k or be twice it, "
            f"got block_n={config.block_n}, block_k={block_k}"
        )
    context_bytes = blocks.max_k_blocks * block_k * head_dim * 2 * key_cache.element_size()
    # exp(x) is taken as exp2(x * log2(e)), and a cap's tanh(x) through exp(2 * x).
    scale = softmax_scale * _LOG2E.value * (2 / softcap if softcap else 1)
    _prefill_tile[(blocks.num_blocks * num_heads,)](
        query, key_cache, value_cache, output, block_table, blocks.table,
        lists.block_lists, lists.counts,
        scale, softcap * _LOG2E.value if softcap else None, step.sinks, step.scales,
        blocks.num_blocks, _heads_at_once(num_heads, num_kv_heads, context_bytes),
        block_table.stride(0), lists.block_lists.stride(0),
        query.stride(0), query.stride(1), output.stride(0), output.stride(1),
        key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        value_cache.stride(0), value_cache.stride(1), value_cache.stride(2),
        GROUP=num_heads // num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PAGE_SIZE=page_size,
        BLOCK_M=blocks.block_q,
        BLOCK_K=block_k,
        BLOCK_N=config.block_n,
        FP8_QUERY=query.dtype in FP8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _heads_at_once(num_heads: int, num_kv_heads: int, context_bytes: int) -> int:
    """Query heads whose contexts fit into the L2 cache together, at least one KV head's."""
    fitting = max(1, _L2_BYTES // context_bytes)
    divisors = (n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0)
    return max(n for n in divisors if n <= fitting) * (num_heads // num_kv_heads)


@triton.jit
def _load(at, in_head, in_context, dtype, PADDED: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        part = tl.load(at, mask=in_head & in_context, other=0.0)
    elif PADDED:
        part = tl.load(at, mask=in_head, other=0.0)
    else:
        part = tl.load(at)
    return part.to(dtype)


@triton.jit
def _walk(
    acc, denominator, row_max, q, key_cache, value_cache, pages, block_list, start, stop,
    scale, softcap, positions, last_position, kv_head,
    stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    PADDED: tl.constexpr = HEAD_DIM != PADDED_DIM
    columns = tl.arange(0, PADDED_DIM)
    in_head = columns < HEAD_DIM
    # A step takes a part of a block, a block, or two blocks of the list.
    IN_PAIRS: tl.constexpr = BLOCK_N > BLOCK_K
    PARTS: tl.constexpr = 1 if IN_PAIRS else BLOCK_K // BLOCK_N
    ON_ONE_PAGE: tl.constexpr = PAGE_SIZE % (BLOCK_K if IN_PAIRS else BLOCK_N) == 0
    column = tl.arange(0, BLOCK_N)
    for step in tl.range(start * PARTS, stop * PARTS, 2 if IN_PAIRS else 1):
        first = tl.load(block_list + step // PARTS) * BLOCK_K + (step % PARTS) * BLOCK_N
        keys = first + column
        second = first
        if IN_PAIRS:
            # What is missing behind the list's end lies behind every row.
            listed = step + 1 < stop
            second = tl.load(block_list + step + 1, mask=listed, other=0) * BLOCK_K
            second = tl.where(listed, second, last_position + 1)
            keys = tl.where(column < BLOCK_K, keys, second + column - BLOCK_K)
        in_context = keys <= last_position
        if ON_ONE_PAGE:
            # A part of the last block may lie past the context, on no page.
            there = first <= last_position
            page = tl.load(pages + first // PAGE_SIZE, mask=there, other=0).to(tl.int64)
            slot = first % PAGE_SIZE + column
            if IN_PAIRS:
                there = second <= last_position
                other = tl.load(pages + second // PAGE_SIZE, mask=there, other=0).to(tl.int64)
                page = tl.where(column < BLOCK_K, page, other)
                slot = tl.where(column < BLOCK_K, slot, second % PAGE_SIZE + column - BLOCK_K)
        else:
            page = tl.load(pages + keys // PAGE_SIZE, mask=in_context, other=0).to(tl.int64)
            slot = keys % PAGE_SIZE
        key_rows = key_cache + page * stride_kp + slot * stride_kt + kv_head * stride_kh
        value_rows = value_cache + page * stride_vp + slot * stride_vt + kv_head * stride_vh
        key_at = key_rows[None, :] + columns[:, None]
        value_at = value_rows[:, None] + columns[None, :]
        k = _load(key_at, in_head[:, None], in_context[None, :], q.dtype, PADDED, MASKED)
        scores = tl.dot(q, k)
        # Without a cap, scores are scaled below, in one fused multiply-add with the shift.
        unit = scale
        if softcap is not None:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * scale) + 1.0))
            unit = 1.0
        if MASKED:
            scores = tl.where(positions[:, None] >= keys[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
        # A part of a masked block may hold no key that a row sees.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores * unit - shift[:, None])
        correction = tl.exp2(row_max - shift)
        denominator = denominator * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None]
        row_max = new_max
        v = _load(value_at, in_head[None, :], in_context[:, None], q.dtype, PADDED, MASKED)
        acc = tl.dot(weights.to(q.dtype), v, acc)
    return acc, denominator, row_max


@triton.jit(
    do_not_specialize=[
        "block_table", "sinks", "scales", "num_blocks", "heads_at_once", "stride_table",
        "stride_list",
    ]
)  # fmt: skip
def _prefill_tile(
    query, key_cache, value_cache, output, block_table, table, block_lists, counts,
    scale, softcap, sinks, scales, num_blocks, heads_at_once, stride_table, stride_list,
    stride_qt, stride_qh, stride_ot, stride_oh,
    stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
    GROUP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, FP8_QUERY: tl.constexpr,
):  # fmt: skip
    # Heads go in sections whose contexts fit into the L2 cache; within one, the longest tiles go
    # first, and those of one query block, which share much of their lists, together.
    program = tl.program_id(0)
    section = heads_at_once * num_blocks
    head = program // section * heads_at_once + program % heads_at_once
    index = program % section // heads_at_once
    tile = head * num_blocks + index
    count = tl.load(counts + tile)
    block_list = block_lists + tile.to(tl.int64) * stride_list
    first_row, num_rows, first_position, _, table_row = load_query_block(table, num_blocks, index)
    pages = block_table + table_row.to(tl.int64) * stride_table
    last_position = first_position + num_rows - 1

    row = tl.arange(0, BLOCK_M)
    present = row < num_rows
    positions = first_position + row
    rows = (first_row + row).to(tl.int64)[:, None]
    columns = tl.arange(0, PADDED_DIM)[None, :]
    in_tile = present[:, None] & (columns < HEAD_DIM)
    q = tl.load(query + rows * stride_qt + head * stride_qh + columns, mask=in_tile, other=0.0)
    if FP8_QUERY:
        q = q.to(tl.float16)  # as `StepInputs.matmul_dtype` says
    if scales is not None:
        scale *= tl.load(scales + head // GROUP) * tl.load(scales + NUM_KV_HEADS + head // GROUP)

    # Diagonal blocks, which need the mask, end the list: those that end past the first row.
    whole = count - (last_position // BLOCK_K - (first_position + 1) // BLOCK_K + 1)
    if BLOCK_N > BLOCK_K:
        whole -= whole % 2

    kv_head = (head // GROUP).to(tl.int64)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    acc, denominator, row_max = _walk(
        acc, denominator, row_max, q, key_cache, value_cache, pages, block_list, 0, whole,
        scale, softcap, positions, last_position, kv_head,
        stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
        HEAD_DIM, PADDED_DIM, PAGE_SIZE, BLOCK_K, BLOCK_N, False,
    )  # fmt: skip
    acc, denominator, row_max = _walk(
        acc, denominator, row_max, q, key_cache, value_cache, pages, block_list, whole, count,
        scale, softcap, positions, last_position, kv_head,
        stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
        HEAD_DIM, PADDED_DIM, PAGE_SIZE, BLOCK_K, BLOCK_N, True,
    )  # fmt: skip
    if sinks is not None:
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        denominator += tl.exp2(tl.load(sinks + head).to(tl.float32) * _LOG2E - shift)
    # Rows that are absent have no weights.
    inverse = 1.0 / tl.where(denominator == 0.0, 1.0, denominator)
    if scales is not None:
        inverse *= tl.load(scales + 2 * NUM_KV_HEADS + kv_head)
    result = (acc * inverse[:, None]).to(output.dtype.element_ty)
    tl.store(output + rows * stride_ot + head * stride_oh + columns, result, mask=in_tile)
