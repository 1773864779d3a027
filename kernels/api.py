"""The operations: one public function each, with one signature for all its implementations.

==================  ==================================  =======================================
operation           for one request                     for a step
==================  ==================================  =======================================
choose key blocks   ``select_blocks``                   ``select_tile_lists``
                    (reference, torch)                  (reference, torch, triton)
the same, written   ``build_tile_lists`` and            ``select_tiles``
as block tables     ``build_tile_tables`` (torch)       (triton)
attend to lists                                         ``sparse_prefill``
                                                        (reference, triton)
attend to tables    ``tile_prefill``                    ``attend_tiles``
                    (the platform's dense kernel)       (the platform's dense kernel)
==================  ==================================  =======================================

Each operation has two forms because its callers hold different data. The tuner, the evaluation and
the CPU backend work on *one request*: its keys lie one after another, ``BlockGeometry`` says on the
host where its blocks are, and the chosen blocks are a mask that the host may count. The CUDA
backend runs *a step*: the keys of many requests lie in pages of a cache, one launch serves all of
them, and the host must not wait for the device. So ``QueryBlocks`` is ``BlockGeometry`` of every
request written once as a table on the device, and the chosen blocks are lists whose lengths stay
there. ``StepInputs.each_request`` turns the second form into the first, which is how the reference
and the torch implementation serve steps.

The functions below check their arguments by what the host knows (shapes, dtypes, devices); nothing
behind them checks again, and no check waits for a device. ``StepInputs`` checks its own tensors
where it is made.
"""

from typing import Literal, Protocol

import torch

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.impl.torch_selection import torch_select, torch_tile_lists
from vllm_afbs.kernels.reference import reference_prefill, reference_select, reference_tile_lists
from vllm_afbs.kernels.step import StepInputs, check_heads
from vllm_afbs.kernels.thresholds import HeadThresholds
from vllm_afbs.kernels.tiles import DensePagedAttention, PackedTiles, TileLists

_LEAST_TRITON_BLOCK = 16  # rows of a matrix product in Triton


class SelectBlocks(Protocol):
    """An implementation of ``select_blocks``."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        thresholds: HeadThresholds,
        geometry: BlockGeometry,
        softmax_scale: float,
    ) -> torch.Tensor:
        """See ``select_blocks``."""


class SelectTileLists(Protocol):
    """An implementation of ``select_tile_lists``."""

    def __call__(
        self,
        step: StepInputs,
        thresholds: HeadThresholds,
        softmax_scale: float,
        num_kept: torch.Tensor,
    ) -> TileLists:
        """See ``select_tile_lists``."""


class SparsePrefill(Protocol):
    """An implementation of ``sparse_prefill``."""

    def __call__(
        self,
        step: StepInputs,
        lists: TileLists,
        output: torch.Tensor,
        softmax_scale: float,
        softcap: float,
    ) -> None:
        """See ``sparse_prefill``."""


def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    thresholds: HeadThresholds,
    geometry: BlockGeometry,
    softmax_scale: float,
    *,
    implementation: Literal["reference", "torch"] = "torch",
) -> torch.Tensor:
    """Chooses the key blocks that each query block of one request attends to.

    ``thresholds`` states the rule. To select with many thresholds from the same scores, call
    ``score_blocks`` once and ``BlockScores.select`` for each of them.

    Args:
        query: ``[q_len, num_heads, head_dim]``, the step's rows.
        key: ``[kv_len, num_kv_heads, head_dim]``, the whole context's.
        thresholds: tau and theta of each query head.
        geometry: The blocks.
        softmax_scale: Factor of the scores.
        implementation: ``reference`` computes in fp64, from tensors on the CPU.

    Returns:
        ``[num_heads, num_q_blocks, num_k_blocks]`` bool, true where the block is computed. Sink,
        diagonal and local blocks are always kept, invisible ones never.

    Raises:
        ValueError: Shapes do not fit each other or ``geometry``.
    """
    check_heads(query.shape, key.shape)
    if (len(query), len(key)) != (geometry.q_len, geometry.kv_len):
        raise ValueError(
            f"query and key must have q_len={geometry.q_len} and kv_len={geometry.kv_len} rows, "
            f"got {len(query)} and {len(key)}"
        )
    _check_thresholds(thresholds, query)
    chosen: SelectBlocks = {"reference": reference_select, "torch": torch_select}[implementation]
    return chosen(query, key, thresholds, geometry, softmax_scale)


def select_tile_lists(
    step: StepInputs,
    thresholds: HeadThresholds,
    softmax_scale: float,
    num_kept: torch.Tensor,
    *,
    implementation: Literal["reference", "torch", "triton"] = "triton",
) -> TileLists:
    """Chooses the key blocks of each tile of a step, as ``select_blocks`` does, and lists them.

    Args:
        step: The layer's tensors.
        thresholds: tau and theta of each query head, on the step's device.
        softmax_scale: Factor of the scores.
        num_kept: ``[num_heads]`` or longer, int64; the number of each head's kept blocks is added.
        implementation: Only ``triton`` does not wait for the device.

    Returns:
        The lists of ``step.num_tiles`` tiles, tile ``head * num_blocks + index`` for block
        ``index`` of ``step.blocks``.

    Raises:
        ValueError: An argument has another shape, dtype or device than stated above, or Triton
            cannot cut blocks of such sizes.
    """
    _check_selection(step, thresholds, num_kept)
    chosen: SelectTileLists
    if implementation == "triton":
        _check_triton_blocks(step)
        # Triton is imported where it runs: the CPU backend and the tuner do without.
        from vllm_afbs.kernels.impl.triton_selection import triton_tile_lists

        chosen = triton_tile_lists
    else:
        chosen = {"reference": reference_tile_lists, "torch": torch_tile_lists}[implementation]
    return chosen(step, thresholds, softmax_scale, num_kept)


def select_tiles(
    step: StepInputs, thresholds: HeadThresholds, softmax_scale: float, num_kept: torch.Tensor
) -> PackedTiles:
    """Does what ``select_tile_lists`` does, and writes tiles for a dense paged kernel.

    Queries are regrouped while they are pooled, so they are read once. The block tables are for
    the caches seen through ``one_head_view``.

    Args:
        step: As in ``select_tile_lists``.
        thresholds: As there.
        softmax_scale: As there.
        num_kept: As there.

    Raises:
        ValueError: As there, or pages do not fit key blocks; see ``StepInputs.tile_page_size``.
    """
    _check_selection(step, thresholds, num_kept)
    _check_triton_blocks(step)
    from vllm_afbs.kernels.impl.triton_selection import triton_tiles

    return triton_tiles(step, thresholds, softmax_scale, num_kept)


def sparse_prefill(
    step: StepInputs,
    lists: TileLists,
    output: torch.Tensor,
    softmax_scale: float,
    *,
    softcap: float = 0.0,
    implementation: Literal["reference", "triton"] = "triton",
) -> None:
    """Attends to the kept blocks of a step's long prefills.

    A row that sees no key of its kept blocks becomes zero.

    Args:
        step: The layer's tensors.
        lists: The tiles' kept blocks, in the order of ``select_tile_lists``; every tile's diagonal
            blocks are among them.
        output: ``[num_tokens, num_heads, head_dim]``, any strides but the last; the rows of
            ``step.blocks`` are written, others are not touched.
        softmax_scale: Factor of the scores.
        softcap: Bounds the scaled scores: ``softcap * tanh(scores / softcap)``; 0 for none.
        implementation: Only ``triton`` does not wait for the device.

    Raises:
        ValueError: An argument has another shape, dtype or device than stated above, or Triton
            cannot cut blocks of such sizes.
    """
    _check_output(step, output)
    if len(lists.counts) != step.num_tiles or len(lists.block_lists) != step.num_tiles:
        raise ValueError(
            f"lists must hold {step.num_tiles} tiles, "
            f"got {len(lists.block_lists)} lists and {len(lists.counts)} counts"
        )
    chosen: SparsePrefill
    if implementation == "triton":
        _check_triton_blocks(step)
        from vllm_afbs.kernels.impl.triton_prefill import triton_prefill

        chosen = triton_prefill
    else:
        chosen = {"reference": reference_prefill}[implementation]
    chosen(step, lists, output, softmax_scale, softcap)


def attend_tiles(
    step: StepInputs,
    tiles: PackedTiles,
    output: torch.Tensor,
    dense_attention: DensePagedAttention,
) -> None:
    """Attends to tiles through the platform's dense kernel, as ``sparse_prefill`` does to lists.

    Args:
        step: The layer's tensors.
        tiles: From ``select_tiles``.
        output: As in ``sparse_prefill``.
        dense_attention: The platform's dense paged kernel over the caches' ``one_head_view``. It
            knows nothing of the step's sinks, which take the log-sum-exps that it returns.

    Raises:
        ValueError: ``output`` or ``tiles`` do not fit the step, or there are sinks and no
            log-sum-exps.
    """
    _check_output(step, output)
    rows = step.num_heads * step.blocks.num_rows
    if len(tiles.query) != rows or len(tiles.tables.seq_lens) != step.num_tiles:
        raise ValueError(
            f"tiles must hold {rows} rows in {step.num_tiles} tiles, "
            f"got {len(tiles.query)} rows in {len(tiles.tables.seq_lens)}"
        )
    from vllm_afbs.kernels.impl.triton_packing import unpack_output

    packed_output = torch.empty_like(tiles.query, dtype=output.dtype)
    lse = dense_attention(tiles.query, packed_output, tiles.tables)
    if step.sinks is not None and lse is None:
        raise ValueError("dense_attention must return log-sum-exps for a step with sinks, got None")
    unpack_output(packed_output, output, step.blocks, lse, step.sinks)


def _check_output(step: StepInputs, output: torch.Tensor) -> None:
    if output.shape != step.query.shape or output.stride(-1) != 1:
        raise ValueError(
            f"output must be {list(step.query.shape)} with a last stride of 1, "
            f"got {list(output.shape)} with strides {output.stride()}"
        )


def _check_selection(step: StepInputs, thresholds: HeadThresholds, num_kept: torch.Tensor) -> None:
    _check_thresholds(thresholds, step.query)
    if num_kept.ndim != 1 or len(num_kept) < step.num_heads or num_kept.dtype != torch.int64:
        raise ValueError(
            f"num_kept must be [{step.num_heads}] or longer, int64, "
            f"got {list(num_kept.shape)} {num_kept.dtype}"
        )


def _check_thresholds(thresholds: HeadThresholds, query: torch.Tensor) -> None:
    for name, each in (("tau", thresholds.tau), ("theta", thresholds.theta)):
        if each.shape != query.shape[1:2] or each.device != query.device:
            raise ValueError(
                f"{name} must be [{query.shape[1]}] on {query.device}, "
                f"got {list(each.shape)} on {each.device}"
            )


def _check_triton_blocks(step: StepInputs) -> None:
    for name, size in (("block_q", step.blocks.block_q), ("block_k", step.blocks.block_k)):
        if size < _LEAST_TRITON_BLOCK or size & (size - 1):
            raise ValueError(
                f"{name} must be a power of two of at least {_LEAST_TRITON_BLOCK}, got {size}"
            )
