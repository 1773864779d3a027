"""One layer's sparse prefill on CUDA, with two kernels that attend to the same blocks.

``TilePrefill`` gives every tile to FlashAttention 3 as a short sequence. ``TritonPrefill`` walks
the same blocks in our own kernel. ``dispatch`` chooses the faster one.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton

from vllm_afbs import compat
from vllm_afbs.kernels import HeadThresholds, TileLists, TileTables
from vllm_afbs.kernels.query_blocks import QueryBlocks
from vllm_afbs.kernels.tiles import one_head_view
from vllm_afbs.kernels.triton_packing import (
    pack_queries,
    pool_queries_in_place,
    unpack_output,
)
from vllm_afbs.kernels.triton_prefill import PrefillFeatures, triton_prefill
from vllm_afbs.kernels.triton_selection import select_tile_lists, select_tile_tables

_MAX_TILE_ROWS = 512
"""Given to FlashAttention 3 as the length of the longest sequence. If no sequence were longer than
its own tiles (128 or 192 rows), it would use slower loads than the tensor copy engine's."""
_LEAST_BLOCK = 16  # smallest side of a matrix product in Triton


_MAX_BLOCK_ELEMENTS = 128 * 256
"""Largest block that fits into 227 KB of shared memory, each row padded to a power of two. Scoring
holds two blocks of keys and 128 pooled queries there. Our attention kernel holds one block of
queries and parts of a block of keys."""


def can_cut(block_q: int, block_k: int, head_dim: int) -> bool:
    """Whether the kernels on CUDA support blocks of these sizes.

    The sizes have to be powers of two. A query block must not be larger than a tile, and each block
    has to fit into shared memory.
    """
    blocks = (block_q, block_k)
    powers = all(block >= _LEAST_BLOCK and block & (block - 1) == 0 for block in blocks)
    elements = max(blocks) * triton.next_power_of_2(head_dim)
    return powers and block_q <= _MAX_TILE_ROWS and elements <= _MAX_BLOCK_ELEMENTS


@dataclass(frozen=True)
class Layer:
    """What both kernels need to know about a layer.

    Attributes:
        thresholds: The thresholds of this rank's query heads, on the device.
        softmax_scale: Factor of the scores.
        softcap: Bound of the scores; 0 for no bound.
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
    """Chooses key blocks, and attends to the chosen blocks."""

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> Any:
        """Chooses blocks, and adds their number by head to ``num_kept``, on the device."""

    def attend(self, step: StepInputs, chosen: Any, output: torch.Tensor) -> None:
        """Writes the rows of the long prefills to ``output``, which is like ``step.query``."""


class TilePrefill:
    """FlashAttention 3 over tiles, in one launch for all requests and heads."""

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
    """Our own Triton kernel."""

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
