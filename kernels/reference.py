"""The oracle: sparse attention as plain loops in fp64.

The tests compare every fast implementation with this file, through the signatures of ``api``. It
is written to be read beside the paper (SpargeAttn, arXiv 2502.18137; AFBS-BO tunes its thresholds)
and shares no computation with the fast ones: it normalises every pair of rows, sums over every key
and walks every list.
"""

from dataclasses import dataclass

import torch

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.step import StepInputs
from vllm_afbs.kernels.thresholds import HeadThresholds
from vllm_afbs.kernels.tiles import TileLists


@dataclass(frozen=True)
class BlockProducts:
    """Block products of one call, summed over heads; a block costs one QK^T and one PV.

    Attributes:
        scored: Products of QK^T done.
        weighed: Products of PV done.
        dense: Products of both kinds that dense causal attention would do.
    """

    scored: int
    weighed: int
    dense: int

    @property
    def computed(self) -> int:
        """Products of both kinds done."""
        return self.scored + self.weighed

    @property
    def sparsity(self) -> float:
        """Share of the dense products that was skipped, in [0, 1)."""
        return 1.0 - self.computed / self.dense


def reference_select(
    query: torch.Tensor,
    key: torch.Tensor,
    thresholds: HeadThresholds,
    geometry: BlockGeometry,
    softmax_scale: float,
) -> torch.Tensor:
    """Implements ``api.select_blocks`` block by block."""
    num_heads = query.shape[1]
    group = num_heads // key.shape[1]
    keep = torch.zeros(num_heads, geometry.num_q_blocks, geometry.num_k_blocks, dtype=torch.bool)
    for head in range(num_heads):
        tau, theta = float(thresholds.tau[head]), float(thresholds.theta[head])
        key_blocks = key[:, head // group].double().split(geometry.block_k)
        below_theta = [_self_similarity(block) < theta for block in key_blocks]
        for i in range(geometry.num_q_blocks):
            scored, index = geometry.scored, int(geometry.scored_index[i])
            rows = _query_block(query, head, index, scored)
            visible = [j for j in range(geometry.num_k_blocks) if geometry.visible[i, j]]
            pooled = [j for j in visible if not below_theta[j]]
            # Rounded, as matrix units take it.
            mean_query = rows.mean(0).to(query.dtype).double() * softmax_scale
            end = int(scored.last_positions[index]) + 1
            scores = [key_blocks[j][: end - j * geometry.block_k] @ mean_query for j in pooled]
            mass = _block_mass(scores)
            kept = set(_largest_until(mass, pooled, tau))
            kept.update(j for j in visible if below_theta[j] or geometry.always[i, j])
            if _self_similarity(rows) < theta:
                kept.update(visible)
            keep[head, i, sorted(kept)] = True
    return keep


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    geometry: BlockGeometry,
    softmax_scale: float,
    lambda_: torch.Tensor | None = None,
    *,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, BlockProducts]:
    """Attends to the kept blocks of one request with an online softmax.

    A kept block whose scores lie so far under the running maximum that
    ``max over rows of (m_local - m_new) < lambda_`` gives its share to the denominator, but its
    product with V is skipped. A row that sees no key of its kept blocks becomes zero.

    Args:
        query: ``[q_len, num_heads, head_dim]``.
        key: ``[kv_len, num_kv_heads, head_dim]``.
        value: Like ``key``.
        keep: ``[num_heads, num_q_blocks, num_k_blocks]`` bool; must hold the diagonal blocks.
        geometry: The blocks.
        softmax_scale: Factor of the scores.
        lambda_: ``[num_heads]``, each <= 0; None skips no product with V.
        softcap: Bounds the scaled scores, ``softcap * tanh(scores / softcap)``; 0 for none.
        sinks: ``[num_heads]``, a logit of each head, neither scaled nor capped, that takes part in
            every row's softmax and has no value, as in gpt-oss; None for none.

    Returns:
        The output, ``[q_len, num_heads, head_dim]`` in fp64, and the block products done.
    """
    num_heads = query.shape[1]
    group = num_heads // key.shape[1]
    output = torch.zeros(query.shape, dtype=torch.float64)
    scored = weighed = 0
    for head in range(num_heads):
        key_blocks = key[:, head // group].double().split(geometry.block_k)
        value_blocks = value[:, head // group].double().split(geometry.block_k)
        threshold = -torch.inf if lambda_ is None else float(lambda_[head])
        for i in range(geometry.num_q_blocks):
            rows = _query_block(query, head, i, geometry)
            positions = torch.arange(
                int(geometry.first_positions[i]), int(geometry.last_positions[i]) + 1
            )
            running_max = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
            denominator = torch.zeros(len(rows), dtype=torch.float64)
            numerator = torch.zeros_like(rows)
            for j in keep[head, i].nonzero().flatten().tolist():
                keys_at = j * geometry.block_k + torch.arange(len(key_blocks[j]))
                scores = rows @ key_blocks[j].T * softmax_scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                scores.masked_fill_(keys_at[None, :] > positions[:, None], -torch.inf)
                local_max = scores.amax(-1)
                new_max = torch.maximum(running_max, local_max)
                # A row may have seen no key yet.
                shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
                weights = torch.exp(scores - shift[:, None])
                correction = torch.exp(running_max - shift)
                denominator = denominator * correction + weights.sum(-1)
                numerator = numerator * correction[:, None]
                scored += 1
                if float((local_max - shift).max()) >= threshold:
                    numerator += weights @ value_blocks[j]
                    weighed += 1
                running_max = new_max
            start, stop = (int(row) for row in geometry.row_starts[i : i + 2])
            if sinks is not None:
                shift = running_max.masked_fill(running_max == -torch.inf, 0.0)
                denominator += torch.exp(sinks[head].double() - shift)
            denominator.masked_fill_(denominator == 0.0, 1.0)
            output[start:stop, head] = numerator / denominator[:, None]
    return output, BlockProducts(scored, weighed, 2 * num_heads * geometry.num_visible)


def reference_varlen(
    query: torch.Tensor,
    contexts: list[tuple[torch.Tensor, torch.Tensor]],
    query_start_loc: list[int],
    thresholds: HeadThresholds,
    block_q: int,
    block_k: int,
    softmax_scale: float,
    lambda_: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[BlockProducts]]:
    """Selects and attends for a batch of requests of different lengths.

    Args:
        query: ``[num_tokens, num_heads, head_dim]``, the requests' rows one after another.
        contexts: Each request's whole K and V, ``[kv_len, num_kv_heads, head_dim]``.
        query_start_loc: First row of each request, and the end, ``len(contexts) + 1`` entries.
        thresholds: tau and theta of each query head.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        softmax_scale: Factor of the scores.
        lambda_: As in ``reference_attention``.

    Returns:
        The output, ``[num_tokens, num_heads, head_dim]`` in fp64, and each request's products.
    """
    outputs, products = [], []
    for i, (key, value) in enumerate(contexts):
        rows = query[query_start_loc[i] : query_start_loc[i + 1]]
        geometry = BlockGeometry(len(rows), len(key), block_q, block_k)
        keep = reference_select(rows, key, thresholds, geometry, softmax_scale)
        output, done = reference_attention(rows, key, value, keep, geometry, softmax_scale, lambda_)
        outputs.append(output)
        products.append(done)
    return torch.cat(outputs), products


def reference_tile_lists(
    step: StepInputs, thresholds: HeadThresholds, softmax_scale: float, num_kept: torch.Tensor
) -> TileLists:
    """Implements ``api.select_tile_lists``, one request, head and query block after another."""
    block_lists = step.block_table.new_zeros(step.num_tiles, step.blocks.max_k_blocks)
    counts = step.block_table.new_zeros(step.num_tiles)
    for request, span, query, key, _ in step.each_request():
        keep = reference_select(
            query.cpu(), key.cpu(), thresholds.to(torch.device("cpu")), request.geometry,
            softmax_scale,
        )  # fmt: skip
        for head in range(step.num_heads):
            for tile, i in _tiles(step, span, head):
                kept = keep[head, i].nonzero().flatten().to(block_lists)
                block_lists[tile, : len(kept)] = kept
                counts[tile] = len(kept)
                num_kept[head] += len(kept)
    return TileLists(block_lists, counts)


def reference_prefill(
    step: StepInputs,
    lists: TileLists,
    output: torch.Tensor,
    softmax_scale: float,
    softcap: float,
) -> None:
    """Implements ``api.sparse_prefill``, one request after another.

    The result is exact to fp64 where ``output`` is fp64.
    """
    for request, span, query, key, value in step.each_request():
        geometry = request.geometry
        keep = torch.zeros(step.num_heads, *geometry.visible.shape, dtype=torch.bool)
        for head in range(step.num_heads):
            for tile, i in _tiles(step, span, head):
                keep[head, i, lists.block_lists[tile, : int(lists.counts[tile])].long().cpu()] = 1
        attended, _ = reference_attention(
            query.cpu(), key.cpu(), value.cpu(), keep, geometry, softmax_scale,
            softcap=softcap, sinks=None if step.sinks is None else step.sinks.cpu(),
        )  # fmt: skip
        output[request.rows] = attended.to(output)


def _tiles(step: StepInputs, span: slice, head: int) -> list[tuple[int, int]]:
    """One head's tiles of one request, and the query block of the request that each one is.

    A step has each request's query blocks from the last to the first.
    """
    first = head * step.blocks.num_blocks
    return [(first + index, span.stop - 1 - index) for index in range(span.start, span.stop)]


def _query_block(query: torch.Tensor, head: int, i: int, geometry: BlockGeometry) -> torch.Tensor:
    start, stop = (int(row) for row in geometry.row_starts[i : i + 2])
    return query[start:stop, head].double()


def _self_similarity(rows: torch.Tensor) -> float:
    """Mean cosine over all pairs of rows, each row with itself included."""
    unit = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return float((unit @ unit.T).mean())


def _block_mass(scores: list[torch.Tensor]) -> torch.Tensor:
    """Mass of each block by its mean key and by its keys one by one, from its keys' scores."""
    if not scores:
        return torch.empty(0)
    by_mean = torch.softmax(torch.stack([block.mean() for block in scores]), dim=0)
    by_key = torch.softmax(torch.cat(scores), dim=0).split([len(block) for block in scores])
    return (by_mean + torch.stack([block.sum() for block in by_key])) / 2


def _largest_until(mass: torch.Tensor, blocks: list[int], tau: float) -> list[int]:
    """The fewest blocks, largest mass first, that reach tau, the crossing one included."""
    if tau >= 1.0:
        return blocks
    kept, total = [], 0.0
    for index in mass.argsort(descending=True, stable=True).tolist():
        if total >= tau:
            break
        kept.append(blocks[index])
        total += float(mass[index])
    return kept
