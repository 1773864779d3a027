"""One layer's sparse prefill on CUDA, with two kernels that attend to the same blocks.

``TilePrefill`` gives every tile to FlashAttention 3 as a short sequence. ``TritonPrefill`` walks
the same blocks in our own kernel. ``dispatch`` chooses the faster one.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vllm_afbs import compat
from vllm_afbs.backends.cuda.dispatch import KernelChoice
from vllm_afbs.kernels import (
    HeadThresholds,
    PackedTiles,
    StepInputs,
    TileLists,
    TileTables,
    attend_tiles,
    one_head_view,
    select_tile_lists,
    select_tiles,
    sparse_prefill,
)

MAX_TILE_ROWS = 512
"""Given to FlashAttention 3 as the length of the longest sequence. If no sequence were longer than
its own tiles (128 or 192 rows), it would use slower loads than the tensor copy engine's."""


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

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> PackedTiles:
        """See ``SparsePrefill``."""
        layer = self._layer
        return select_tiles(step, layer.thresholds, layer.softmax_scale, num_kept)

    def attend(self, step: StepInputs, chosen: PackedTiles, output: torch.Tensor) -> None:
        """See ``SparsePrefill``."""
        descales = _descales(step)
        caches = [
            one_head_view(cache, step.tile_page_size)
            for cache in (step.key_cache, step.value_cache)
        ]

        def dense(query: torch.Tensor, output: torch.Tensor, tables: TileTables) -> torch.Tensor:
            # Sinks are left to `attend_tiles`: FlashAttention takes one for each head of a launch,
            # and all tiles are sequences of one head.
            _, lse = self._flash_attention(
                query,
                *caches,
                out=output,
                cu_seqlens_q=tables.query_start_loc,
                max_seqlen_q=MAX_TILE_ROWS,
                seqused_k=tables.seq_lens,
                max_seqlen_k=step.blocks.max_k_blocks * step.blocks.block_k,
                softmax_scale=self._layer.softmax_scale,
                softcap=self._layer.softcap,
                causal=True,
                block_table=tables.block_table,
                fa_version=3,
                num_splits=1,
                return_softmax_lse=True,
                **descales,
            )
            by_row: torch.Tensor = lse[0]
            return by_row

        attend_tiles(step, chosen, output, dense)


def _descales(step: StepInputs) -> dict[str, torch.Tensor]:
    scales = step.tile_scales
    if scales is None:
        return {}
    names = ("q_descale", "k_descale", "v_descale")
    return dict(zip(names, scales, strict=True))


class TritonPrefill:
    """Our own Triton kernel."""

    def __init__(self, layer: Layer) -> None:
        """Takes the layer."""
        self._layer = layer

    def choose(self, step: StepInputs, num_kept: torch.Tensor) -> TileLists:
        """See ``SparsePrefill``."""
        layer = self._layer
        return select_tile_lists(step, layer.thresholds, layer.softmax_scale, num_kept)

    def attend(self, step: StepInputs, chosen: TileLists, output: torch.Tensor) -> None:
        """See ``SparsePrefill``."""
        layer = self._layer
        sparse_prefill(step, chosen, output, layer.softmax_scale, softcap=layer.softcap)


def make_prefills(
    layer: Layer, flash_attention_version: int | None
) -> dict[KernelChoice, SparsePrefill]:
    """A layer's sparse prefill with each kernel that there is beside a version of FlashAttention.

    Tiles need version 3, as they were measured with no other.

    Args:
        layer: The layer.
        flash_attention_version: The version; None if there is no FlashAttention.
    """
    prefills: dict[KernelChoice, SparsePrefill] = {"triton": TritonPrefill(layer)}
    if flash_attention_version == 3:
        prefills["tiles"] = TilePrefill(layer)
    return prefills
