"""Scoring thresholds: the error and sparsity that the served selector would give.

The attention of a layer is computed once, split into *partials*: for every (query row, key block),
the softmax over that block alone. The output for any choice of blocks is then an exact weighted
sum of partials, as in the online softmax. So a choice costs one pass over memory, and the products
with K and V are not computed again.

Sinks and soft-capping are in the outputs that errors compare. They are not in the selection: the
server chooses blocks by scores without either, so a tau means the same here as there.

The tuner leaves lambda unset: the served tiles run whole blocks through the platform's dense
kernel, which cannot skip P.V inside a block.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_afbs.captures import LayerTensors
from vllm_afbs.kernels import (
    THETA_OFF,
    BlockGeometry,
    HeadThresholds,
    cut_keys,
    score_blocks,
)

_HOST_CACHE_BYTES = 3 << 30
_DEVICE_CACHE_SHARE = 0.25  # of a GPU's memory; a layer keeps partials at three lengths or more


@dataclass(frozen=True)
class HeadScores:
    """What thresholds do to each head of a layer.

    Attributes:
        error: Relative L1 against dense over the sampled rows, ``[num_heads]``, fp64.
        sparsity: Share of the dense block products (QK^T and PV) that is skipped, over all query
            blocks, sampled or not, ``[num_heads]``, fp64.
    """

    error: torch.Tensor
    sparsity: torch.Tensor


@dataclass(frozen=True)
class _Partials:
    """One query block's softmax over each visible key block, every query head's rows.

    The dimension of query heads is split into ``[num_kv_heads, group]``.

    Attributes:
        maxima: Largest score, ``[num_k_blocks, num_kv_heads, group, rows, 1]``.
        outputs: Sum of ``exp(score - maximum) * value``; the last column is the sum of
            ``exp(score - maximum)`` alone. ``[num_k_blocks, num_kv_heads, group, rows,
            head_dim + 1]``.
        sink: Logit without a value, ``[num_kv_heads, group, 1, 1]``; None for none.
        dense: Output over all blocks, ``[num_heads, rows, head_dim]``.
    """

    maxima: torch.Tensor
    outputs: torch.Tensor
    sink: torch.Tensor | None
    dense: torch.Tensor

    @classmethod
    def of(
        cls, maxima: torch.Tensor, outputs: torch.Tensor, sink: torch.Tensor | None
    ) -> "_Partials":
        """Takes the block dimension, last in ``maxima`` and second in ``outputs``, to the front."""
        by_block = maxima.movedim(-1, 0)[..., None].contiguous()
        sums = outputs.transpose(0, 1)
        num_heads = maxima.shape[0] * maxima.shape[1]
        everything = torch.ones(num_heads, len(sums), dtype=torch.bool, device=maxima.device)
        by_head = None if sink is None else sink.view(*maxima.shape[:2], 1, 1)
        return cls(by_block, sums, by_head, _combine(by_block, sums, by_head, everything))

    def attend(self, keep: torch.Tensor) -> torch.Tensor:
        """Attention over the kept blocks, ``[num_heads, num_k_blocks]``; like ``dense``."""
        return _combine(self.maxima, self.outputs, self.sink, keep)


class LayerEvaluator:
    """Scores thresholds for all heads of one layer at one length.

    It computes on the tensors' device. Thresholds and scores are on the host.

    Args:
        tensors: The layer's inputs; the first ``length`` positions are used.
        length: Tokens of context; the rows attend causally.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        row_share: Share of the query blocks whose error is measured, in (0, 1]. The blocks are
            spread evenly over the context and always include the last.
        cache_bytes: Partials that take more memory are not kept: each score computes them again.
            None for what the device has room for.
    """

    def __init__(
        self,
        tensors: LayerTensors,
        length: int,
        block_q: int,
        block_k: int,
        row_share: float = 1.0,
        cache_bytes: int | None = None,
    ) -> None:
        self.length = length
        self.num_heads = tensors.query.shape[1]
        self.geometry = BlockGeometry(length, length, block_q, block_k)
        self._query = tensors.query[:length]
        self._key = tensors.key[:length]
        self._value = tensors.value[:length]
        self._softmax_scale, self._softcap = tensors.softmax_scale, tensors.softcap
        self._sink = tensors.sink
        self.sampled_blocks = _spread(self.geometry.num_q_blocks, row_share)
        self._scores = score_blocks(self._query, self._key, self.geometry, self._softmax_scale)
        self._device = tensors.query.device
        self._cache_bytes = (
            default_cache_bytes(self._device) if cache_bytes is None else cache_bytes
        )

    @property
    def row_share(self) -> float:
        """Share of the query rows whose error is measured."""
        starts = self.geometry.row_starts
        rows = sum(int(starts[i + 1] - starts[i]) for i in self.sampled_blocks)
        return rows / self.length

    def theta_at(self, quantile: float) -> torch.Tensor:
        """The theta of each head at a quantile of its blocks' self-similarities.

        Self-similarities differ more between heads than within one. One theta for a layer would lie
        above all blocks of some heads and below all of others, so theta is chosen by its quantile,
        which means the same for all heads.

        Args:
            quantile: Share of the query and key blocks with a self-similarity below theta, in
                [0, 1]. These blocks stay out of the softmax and are always computed.

        Returns:
            theta of each head, ``[num_heads]``; off where ``quantile`` is 0.
        """
        if quantile == 0.0:
            return torch.full((self.num_heads,), THETA_OFF)
        group = self.num_heads // len(self._scores.key_self_similarity)
        keys = self._scores.key_self_similarity.repeat_interleave(group, dim=0)
        blocks = torch.cat([self._scores.query_self_similarity, keys], dim=1)
        return blocks.quantile(quantile, dim=1).cpu()

    def score(self, thresholds: HeadThresholds) -> HeadScores:
        """Measures every head under its thresholds.

        Args:
            thresholds: tau and theta of each query head.

        Returns:
            Error and sparsity of each head.
        """
        keep = self._select(thresholds)
        difference = torch.zeros(self.num_heads, dtype=torch.float64, device=self._device)
        magnitude = torch.zeros_like(difference)
        for i, partial in zip(self.sampled_blocks, self._partials(), strict=True):
            output = partial.attend(keep[:, i, : len(partial.maxima)])
            difference += (output - partial.dense).abs().sum((1, 2), dtype=torch.float64)
            magnitude += partial.dense.abs().sum((1, 2), dtype=torch.float64)
        return HeadScores((difference / magnitude).cpu(), self._sparsity_of(keep))

    def sparsity(self, thresholds: HeadThresholds) -> torch.Tensor:
        """The sparsity that ``score`` returns; it needs only the selection, and no attention."""
        return self._sparsity_of(self._select(thresholds))

    def _select(self, thresholds: HeadThresholds) -> torch.Tensor:
        return self._scores.select(thresholds.to(self._device), self.geometry)

    def _sparsity_of(self, keep: torch.Tensor) -> torch.Tensor:
        kept = keep.sum((1, 2), dtype=torch.float64).cpu()
        return 1.0 - kept / self.geometry.num_visible

    def _partials(self) -> Iterable[_Partials]:
        blocks = sum(int(self.geometry.visible[i].sum()) for i in self.sampled_blocks)
        per_row_bytes = 4 * (self._query.shape[2] + 2)
        size_bytes = self.num_heads * self.geometry.block_q * blocks * per_row_bytes
        return self._kept_partials if size_bytes <= self._cache_bytes else self._compute_partials()

    @cached_property
    def _kept_partials(self) -> Sequence[_Partials]:
        return list(self._compute_partials())

    def _compute_partials(self) -> Iterable[_Partials]:
        num_kv_heads, head_dim = self._key.shape[1:]
        group = self.num_heads // num_kv_heads
        block_k = self.geometry.block_k
        keys, _ = cut_keys(self._key.float() * self._softmax_scale, self.geometry)
        values, _ = cut_keys(self._value.float(), self.geometry)
        # A column of ones makes the product with V sum the weights as well.
        values = torch.nn.functional.pad(values, (0, 1), value=1.0)
        # One buffer for all blocks: the kernel would map and zero a new one each time.
        buffer = keys.new_empty(self.num_heads * self.geometry.block_q * keys[0, ..., 0].numel())
        for i in self.sampled_blocks:
            start, stop = (int(row) for row in self.geometry.row_starts[i : i + 2])
            num_blocks, rows = int(self.geometry.visible[i].sum()), stop - start
            query = self._query[start:stop].float().transpose(0, 1)
            query = query.reshape(num_kv_heads, group * rows, head_dim)
            shape = num_kv_heads, group * rows, num_blocks * block_k
            scores = buffer[: math.prod(shape)].view(shape)
            torch.bmm(query, keys[:, :num_blocks].flatten(1, 2).transpose(1, 2), out=scores)
            if self._softcap:
                scores.div_(self._softcap).tanh_().mul_(self._softcap)
            scores = scores.view(self.num_heads, rows, num_blocks * block_k)
            keys_at = torch.arange(start, num_blocks * block_k, device=self._device)
            hidden = keys_at > torch.arange(start, stop, device=self._device)[:, None]
            scores[..., start:].masked_fill_(hidden, -torch.inf)
            scores = scores.view(num_kv_heads, group * rows, num_blocks, block_k)
            maxima = scores.amax(-1)
            # A row may see no key of a diagonal block: exp(-inf - finite) gives it zero weight.
            weights = scores.sub_(maxima.clamp_min(torch.finfo().min)[..., None]).exp_()
            outputs = values.new_empty(num_kv_heads, num_blocks, group * rows, head_dim + 1)
            for kv_head in range(
                num_kv_heads
            ):  # one product over all KV heads would copy the weights
                torch.bmm(
                    weights[kv_head].transpose(0, 1),
                    values[kv_head, :num_blocks],
                    out=outputs[kv_head],
                )
            yield _Partials.of(
                maxima.view(num_kv_heads, group, rows, num_blocks),
                outputs.view(num_kv_heads, num_blocks, group, rows, head_dim + 1),
                self._sink,
            )


def _combine(
    maxima: torch.Tensor, outputs: torch.Tensor, sink: torch.Tensor | None, keep: torch.Tensor
) -> torch.Tensor:
    by_block = keep.T.reshape(*maxima.shape[:3], 1, 1)
    kept = maxima.masked_fill(~by_block, -torch.inf)
    highest = kept.amax(0)
    weights = torch.exp(kept - highest)
    if outputs.is_cuda:
        # Products with the dropped blocks' zeros cost less than a launch for every block.
        total = (weights * outputs).sum(0)
    else:
        total = torch.zeros_like(outputs[0])
        for j in keep.any(0).nonzero().flatten().tolist():
            total.addcmul_(weights[j], outputs[j])
    denominator = total[..., -1:]
    if sink is not None:
        denominator = denominator + torch.exp(sink - highest)
    return (total[..., :-1] / denominator).flatten(0, 1)


def default_cache_bytes(device: torch.device) -> int:
    """Memory that one evaluator's partials may take."""
    if device.type == "cuda":
        return int(_DEVICE_CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return _HOST_CACHE_BYTES


def _spread(num_blocks: int, share: float) -> list[int]:
    """Evenly spaced block numbers that end with the last one."""
    count = max(1, round(num_blocks * share))
    return [(step + 1) * num_blocks // count - 1 for step in range(count)]
