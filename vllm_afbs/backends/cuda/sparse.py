"""One layer's sparse prefill on CUDA, in two ways that choose the same blocks.

``TilePrefill`` hands every tile to FlashAttention 3 as a short sequence of its own;
``TritonPrefill`` walks the same blocks in our kernel. ``dispatch`` says which is faster where.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton

from vllm_afbs import compat
from vllm_afbs.kernels import (
    HeadThresholds,
    PackedTiles,
    PrefillFeatures,
    StepInputs,
    TileLists,
    TileTables,
    attend_tiles,
    one_head_view,
    select_tile_lists,
    select_tiles,
    sparse_prefill,
)

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

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> PackedTiles:
        """See ``SparsePrefill``."""
        layer = self._layer
        return select_tiles(step, layer.thresholds, layer.softmax_scale, num_kept)

    def attend(self, step: StepInputs, chosen: PackedTiles, output: torch.Tensor) -> None:
        """See ``SparsePrefill``."""

        def dense(query: torch.Tensor, output: torch.Tensor, tables: TileTables) -> None:
            self._flash_attention(
                query,
                one_head_view(step.key_cache),
                one_head_view(step.value_cache),
                out=output,
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

        attend_tiles(step, chosen, output, dense)


class TritonPrefill:
    """Our own kernel."""

    def __init__(self, layer: Layer) -> None:
        """Takes the layer."""
        self._layer = layer

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> TileLists:
        """See ``SparsePrefill``."""
        layer = self._layer
        return select_tile_lists(step, layer.thresholds, layer.softmax_scale, num_kept)

    def attend(self, step: StepInputs, chosen: TileLists, output: torch.Tensor) -> None:
        """See ``SparsePrefill``."""
        features = PrefillFeatures(softcap=self._layer.softcap)
        sparse_prefill(step, chosen, output, self._layer.softmax_scale, features=features)
