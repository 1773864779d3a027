"""Choosing one request's key blocks in torch, on any device; ``thresholds`` states the rule."""

from dataclasses import dataclass, replace

import torch

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.step import StepInputs
from vllm_afbs.kernels.thresholds import MEAN_KEY_SHARE, HeadThresholds
from vllm_afbs.kernels.tiles import TileLists, build_tile_lists


@dataclass(frozen=True)
class BlockStats:
    """What pooling keeps of a row of blocks.

    Attributes:
        mean: Mean of each block's rows, ``[num_heads, num_blocks, head_dim]``.
        self_similarity: Mean cosine over all pairs of each block's rows,
            ``[num_heads, num_blocks]``, fp32.
    """

    mean: torch.Tensor
    self_similarity: torch.Tensor


@dataclass(frozen=True)
class BlockScores:
    """What selection knows of one request before any thresholds.

    Attributes:
        mean: Score of a block's mean key, ``[num_heads, num_q_blocks, num_k_blocks]``, fp32, -inf
            where no key is visible.
        total: Like ``mean``: log of the sum of the exponentials of its keys' scores.
        query_self_similarity: Of each query block, ``[num_heads, num_q_blocks]``, fp32; of both
            blocks' rows where they are scored in pairs.
        key_self_similarity: Of each key block, ``[num_kv_heads, num_k_blocks]``, fp32.
    """

    mean: torch.Tensor
    total: torch.Tensor
    query_self_similarity: torch.Tensor
    key_self_similarity: torch.Tensor

    def mass(self, dropped: torch.Tensor, mean_key_share: float = MEAN_KEY_SHARE) -> torch.Tensor:
        """Share of each row's attention that its blocks are taken to have.

        Args:
            dropped: Blocks to leave out, broadcast to ``mean``, bool.
            mean_key_share: Share that the blocks' mean keys decide; by default as served.

        Returns:
            Like ``mean``; a row with nothing left has no mass.
        """
        by_mean, by_key = (
            torch.softmax(scores.masked_fill(dropped, -torch.inf), dim=-1).nan_to_num_(0.0)
            for scores in (self.mean, self.total)
        )
        return torch.lerp(by_key, by_mean, mean_key_share)

    def select(self, thresholds: HeadThresholds, geometry: BlockGeometry) -> torch.Tensor:
        """Chooses the key blocks that each query block of each head attends to.

        Args:
            thresholds: tau and theta of each query head, on the scores' device.
            geometry: The blocks that were scored.

        Returns:
            ``[num_heads, num_q_blocks, num_k_blocks]`` bool, true where the block is computed.
            Sink, diagonal and local blocks are always kept, invisible ones never.
        """
        num_heads, group = len(self.mean), len(self.mean) // len(self.key_self_similarity)
        visible, always = (m.to(self.mean.device) for m in (geometry.visible, geometry.always))
        theta = thresholds.theta[:, None]
        key_self_similarity = self.key_self_similarity.repeat_interleave(group, dim=0)
        keys_below_theta = (key_self_similarity < theta)[:, None, :]
        queries_below_theta = (self.query_self_similarity < theta)[:, :, None]
        keep = _smallest_set(self.mass(keys_below_theta), thresholds.tau.view(num_heads, 1, 1))
        return (keep | keys_below_theta | queries_below_theta | always) & visible


def pool_blocks(rows: torch.Tensor, counts: torch.Tensor) -> BlockStats:
    """Reduces blocks of rows to their mean and their self-similarity.

    Args:
        rows: ``[num_heads, num_blocks, block, head_dim]``, any float dtype; rows past a block's
            count must be finite and are ignored.
        counts: Rows present in each block, ``[num_blocks]``, int.

    Returns:
        The blocks' statistics in fp32.
    """
    values, weights = rows.float(), _row_weights(rows, counts)
    return BlockStats((weights @ values).squeeze(2), _self_similarity(values, weights))


def _row_weights(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Weights of a mean over each block's rows, ``[1, num_blocks, 1, block]``, fp32."""
    block = rows.shape[2]
    present = (torch.arange(block, device=rows.device)[None, :] < counts[:, None]).float()
    weights: torch.Tensor = (present / counts[:, None])[None, :, None, :]
    return weights


def _self_similarity(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean pairwise cosine of each block's rows, each with itself included.

    It is the squared length of the mean of the normalised rows, so it costs one reduction rather
    than n^2 products.
    """
    norms = torch.linalg.vector_norm(values, dim=-1)
    inverse_norms: torch.Tensor = norms.clamp_min_(1e-12).reciprocal_()
    direction: torch.Tensor = (weights * inverse_norms[:, :, None, :]) @ values
    return direction.square().sum(-1).squeeze(2)


def pool_queries(query: torch.Tensor, geometry: BlockGeometry) -> BlockStats:
    """Pools a step's query rows into the blocks that ``geometry`` cuts.

    Args:
        query: ``[q_len, num_heads, head_dim]``.
        geometry: The step's blocks.

    Returns:
        Statistics of ``geometry.num_q_blocks`` blocks per query head; means in the queries' dtype,
        as matrix units multiply them with keys.
    """
    q_len, num_heads, head_dim = query.shape
    num_blocks, block = geometry.num_q_blocks, geometry.block_q
    # Rows are packed to the front of their block: the first block's may begin mid-block.
    first = int(geometry.row_starts[1])
    padded = query.new_zeros(num_heads, num_blocks * block, head_dim)
    by_head = query.transpose(0, 1)
    padded[:, :first] = by_head[:, :first]
    padded[:, block : block + q_len - first] = by_head[:, first:]
    stats = pool_blocks(
        padded.view(num_heads, num_blocks, block, head_dim),
        geometry.row_starts.diff().to(query.device),
    )
    return replace(stats, mean=stats.mean.to(query.dtype))


def pool_keys(key: torch.Tensor, geometry: BlockGeometry) -> BlockStats:
    """Pools a context's keys into the blocks that ``geometry`` cuts.

    Args:
        key: ``[length, num_kv_heads, head_dim]`` with ``length >= geometry.kv_len``; what lies
            past the context is ignored and need not be finite.
        geometry: The step's blocks.

    Returns:
        Statistics of ``geometry.num_k_blocks`` blocks per KV head.
    """
    return pool_blocks(*cut_keys(key, geometry))


def cut_keys(rows: torch.Tensor, geometry: BlockGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts a context's keys, or its values, into blocks.

    Args:
        rows: ``[length, num_kv_heads, head_dim]`` with ``length >= geometry.kv_len``.
        geometry: The step's blocks.

    Returns:
        ``[num_kv_heads, num_k_blocks, block_k, head_dim]``, the last block padded with zeros, and
        how many rows each block holds, ``[num_k_blocks]``.
    """
    _, num_kv_heads, head_dim = rows.shape
    kv_len, num_blocks, block = geometry.kv_len, geometry.num_k_blocks, geometry.block_k
    padded = rows.new_zeros(num_kv_heads, num_blocks * block, head_dim)
    padded[:, :kv_len] = rows[:kv_len].transpose(0, 1)
    starts = torch.arange(num_blocks, device=rows.device) * block
    return padded.unflatten(1, (num_blocks, block)), (kv_len - starts).clamp_max(block)


def score_blocks(
    query: torch.Tensor, key: torch.Tensor, geometry: BlockGeometry, softmax_scale: float
) -> BlockScores:
    """Scores a request's key blocks for each of its query blocks.

    Args:
        query: ``[q_len, num_heads, head_dim]``, the step's rows.
        key: ``[length, num_kv_heads, head_dim]`` with ``length >= geometry.kv_len``.
        geometry: The step's blocks.
        softmax_scale: Factor of the scores.

    Returns:
        Scores from which any thresholds select.
    """
    scored, index = geometry.scored, geometry.scored_index.to(query.device)
    queries, (blocks, counts) = pool_queries(query, scored), cut_keys(key, geometry)
    num_kv_heads, keys = len(blocks), blocks.float()
    pooled = queries.mean.float().unflatten(0, (num_kv_heads, -1)) * softmax_scale
    shape = (num_kv_heads, *pooled.shape[1:3], geometry.num_k_blocks)
    mean, total = (pooled.new_empty(shape) for _ in range(2))
    for head in range(num_kv_heads):  # all heads' scores at once would take gigabytes
        scores = pooled[head] @ keys[head].flatten(0, 1).T
        mean[head], total[head] = _reduce_scores(scores, scored)
    invisible = ~geometry.visible.to(mean.device)
    return BlockScores(
        mean.flatten(0, 1)[:, index].masked_fill_(invisible, -torch.inf),
        total.flatten(0, 1)[:, index].masked_fill_(invisible, -torch.inf),
        queries.self_similarity[:, index],
        _self_similarity(keys, _row_weights(keys, counts)),
    )


def _reduce_scores(
    scores: torch.Tensor, geometry: BlockGeometry
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-sum-exp of each block's scores, ``[..., num_q_blocks, padded keys]``."""
    device, block = scores.device, geometry.block_k
    by_block = scores.unflatten(-1, (-1, block))
    mean, total = by_block.mean(-1), by_block.logsumexp(-1)
    # Only a block that a query block's last row ends inside is seen in part.
    ends = geometry.last_positions + 1
    rows = (ends % block).nonzero().flatten()
    seen = (torch.arange(block)[None, :] < (ends % block)[rows, None]).to(device)
    rows, last_block = rows.to(device), (ends[rows] // block).to(device)
    partial = by_block[..., rows, last_block, :]
    counts = seen.sum(-1)
    mean[..., rows, last_block] = partial.masked_fill(~seen, 0.0).sum(-1) / counts
    total[..., rows, last_block] = partial.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return mean, total


def torch_select(
    query: torch.Tensor,
    key: torch.Tensor,
    thresholds: HeadThresholds,
    geometry: BlockGeometry,
    softmax_scale: float,
) -> torch.Tensor:
    """Implements ``api.select_blocks``."""
    return score_blocks(query, key, geometry, softmax_scale).select(thresholds, geometry)


def torch_tile_lists(
    step: StepInputs, thresholds: HeadThresholds, softmax_scale: float, num_kept: torch.Tensor
) -> TileLists:
    """Implements ``api.select_tile_lists``, one request after another."""
    keeps = []
    for request, _, query, key, _ in step.each_request():
        keep = torch_select(query, key, thresholds, request.geometry, softmax_scale)
        num_kept[: step.num_heads] += keep.sum((1, 2))
        missing = step.blocks.max_k_blocks - request.geometry.num_k_blocks
        keeps.append(torch.nn.functional.pad(keep.flip(1), (0, missing)))
    return build_tile_lists(torch.cat(keeps, dim=1))


def _smallest_set(mass: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Marks the fewest entries of each row whose sum reaches tau, the crossing one included."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    # Rounded sums can reach 1 early, so tau = 1 is not left to them.
    needed = (before < tau) | (tau >= 1.0)
    return torch.zeros_like(needed).scatter_(-1, order, needed)
