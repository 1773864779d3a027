"""One layer's sparse prefill on CUDA, in two ways that choose the same blocks.

``TilePrefill`` hands every tile to FlashAttention 3 as a short sequence of its own;
``TritonPrefill`` walks the same blocks in our kernel. ``dispatch`` says which is faster where.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton

from vllm_afbs import compat
from vllm_afbs.kernels import HeadThresholds, TileLists, TileTables
from vllm_afbs.kernels.impl.torch_tiles import one_head_view
from vllm_afbs.kernels.impl.triton_packing import (
    pack_queries,
    pool_queries_in_place,
    unpack_output,
)
from vllm_afbs.kernels.impl.triton_prefill import PrefillFeatures, triton_prefill
from vllm_afbs.kernels.impl.triton_selection import select_tile_lists, select_tile_tables
from vllm_afbs.kernels.query_blocks import QueryBlocks

_MAX_TILE_ROWS = 512
"""Told to FlashAttention 3 as the longest sequence: from its tile size (128 or 192 rows) down it
leaves the tensor copy engine for slower loads, and all our sequences are that short."""
_LEAST_BLOCK = 16  # of a matrix product in Triton


_MAX_BLOCK_ELEMENTS = 128 * 256
"""Of a block, its rows padded to a power of two: scoring holds two of keys in 227 KB of shared
memory, beside 128 pooled queries, and our attention kernel one of queries beside parts of keys."""


def can_cut(block_q: int, block_k: int, head_dim: int) -> bool:
    """Whether kernels on CUDA take such blocks.

    They have to be of a power of two, query blocks no larger than a tile, and both no larger than
    shared memory allows.
    """
    blocks = (block_q, block_k)
    powers = all(block >= _LEAST_BLOCK and block & (block - 1) == 0 for block in blocks)
    elements = max(blocks) * triton.next_power_of_2(head_dim)
    return powers and block_q <= _MAX_TILE_ROWS and elements <= _MAX_BLOCK_ELEMENTS


@dataclass(frozen=True)
class Layer:
    """What both ways need to know of a layer.

    Attributes:
        thresholds: Of this rank's query heads, on the device.
        softmax_scale: Factor of the scores.
        softcap: Bound of the scores; 0 for none.
    """

    thresholds: HeadThresholds
    softmax_scale: float
    softcap: float


@dataclass(frozen=True)
class StepInputs:
    """A layer's tensors in one step.

    Attributes:
        query: ``[num_tokens, num_heads, head_dim]``.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, this step's keys included.
        value_cache: Like ``key_cache``.
        block_table: ``[num_reqs, max_pages]``, int32.
        blocks: The query blocks of the long prefills.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    blocks: QueryBlocks


class SparsePrefill(Protocol):
    """Chooses key blocks, and attends to the chosen ones."""

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> Any:
        """Chooses blocks; their number is added to ``num_kept`` on the device, head by head."""

    def attend(self, step: StepInputs, chosen: Any, output: torch.Tensor) -> None:
        """Writes the long prefills' rows of ``output``, which is like ``step.query``."""


class TilePrefill:
    """FlashAttention 3 over tiles, one launch for all requests and heads."""

    def __init__(self, layer: Layer) -> None:
        """Takes the layer."""
        self._layer = layer
        self._flash_attention = compat.flash_attention()

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> tuple[torch.Tensor, TileTables]:
        """See ``SparsePrefill``.

        Returns:
            The packed queries and their block tables.
        """
        packed, stats = pack_queries(step.query, step.blocks)
        tables = select_tile_tables(
            stats, step.key_cache, step.block_table, self._layer.thresholds, step.blocks,
            self._layer.softmax_scale, num_kept,
        )  # fmt: skip
        return packed, tables

    def attend(
        self, step: StepInputs, chosen: tuple[torch.Tensor, TileTables], output: torch.Tensor
    ) -> None:
        """See ``SparsePrefill``."""
        packed, tables = chosen
        packed_output = torch.empty_like(packed)
        self._flash_attention(
            packed,
            one_head_view(step.key_cache),
            one_head_view(step.value_cache),
            out=packed_output,
            cu_seqlens_q=tables.query_start_loc,
            max_seqlen_q=_MAX_TILE_ROWS,
            seqused_k=tables.seq_lens,
            max_seqlen_k=step.blocks.max_k_blocks * step.blocks.block_k,
            softmax_scale=self._layer.softmax_scale,
            softcap=self._layer.softcap,
            causal=True,
            block_table=tables.block_table,
            fa_version=3,
            num_splits=1,
        )
        unpack_output(packed_output, output, step.blocks)


class TritonPrefill:
    """Our own kernel."""

    def __init__(self, layer: Layer) -> None:
        """Takes the layer."""
        self._layer = layer

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> TileLists:
        """See ``SparsePrefill``.

        Returns:
            The tiles' kept blocks.
        """
        return select_tile_lists(
            pool_queries_in_place(step.query, step.blocks), step.key_cache, step.block_table,
            self._layer.thresholds, step.blocks, self._layer.softmax_scale, num_kept,
        )  # fmt: skip

    def attend(self, step: StepInputs, chosen: TileLists, output: torch.Tensor) -> None:
        """See ``SparsePrefill``."""
        triton_prefill(
            step.query, step.key_cache, step.value_cache, output, step.block_table, chosen,
            step.blocks, self._layer.softmax_scale,
            features=PrefillFeatures(softcap=self._layer.softcap),
        )  # fmt: skip
