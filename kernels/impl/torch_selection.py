"""Choosing key blocks: pooled queries' scores, the mass threshold tau, the similarity guard theta.

The rule is SpargeAttn's (arXiv 2502.18137, section 3) with two changes:

- Keys are not only pooled. Half of a block's mass is what the softmax over the blocks' mean keys
  gives it, as there; the other half is what the softmax over the keys themselves gives to its keys
  together. The mean hides a key that stands out from its block, and a mean query overrates such a
  key; each half has what the other lacks, and for the same error heads skip nearly as much as with
  exact masses (README, "Which scores select"). It takes one product of the pooled queries and all
  keys, ``1 / block_q`` of what dense attention multiplies to score.
- A block is scored by the keys that the query block's last row sees, and K is taken as it is, not
  less its mean over the sequence (which changes neither softmax). So selection is the same for
  every chunk size that keeps query and key blocks whole, and for prefix-cache hits. theta is tuned
  on the same unsmoothed similarity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from vllm_afbs.kernels.geometry import BlockGeometry

THETA_OFF = -1.0
"""Similarities lie in [0, 1] up to rounding, so no block is ever below this theta."""

MEAN_KEY_SHARE = 0.5
"""Share of a block's mass that goes by its mean key; the rest goes by its keys one by one."""


@dataclass(frozen=True)
class BlockStats:
    """What pooling keeps of a row of blocks.

    Attributes:
        mean: Mean of each block's rows, ``[num_heads, num_blocks, head_dim]``.
        similarity: Mean pairwise cosine of each block's rows, ``[num_heads, num_blocks]``, fp32.
    """

    mean: torch.Tensor
    similarity: torch.Tensor


@dataclass(frozen=True)
class BlockScores:
    """What selection knows of one request, whatever the thresholds.

    Attributes:
        mean: Score of a block's mean key, ``[num_heads, num_q_blocks, num_k_blocks]``, fp32, -inf
            where no key is visible.
        total: Like ``mean``: log of the sum of the exponentials of its keys' scores.
        query_similarity: Self-similarity of query blocks, ``[num_heads, num_q_blocks]``, fp32.
        key_similarity: Of key blocks, ``[num_kv_heads, num_k_blocks]``, fp32.
    """

    mean: torch.Tensor
    total: torch.Tensor
    query_similarity: torch.Tensor
    key_similarity: torch.Tensor

    def mass(self, dropped: torch.Tensor, mean_key_share: float = MEAN_KEY_SHARE) -> torch.Tensor:
        """Share of each row's attention that its blocks are taken to have.

        Args:
            dropped: Blocks to leave out, broadcast to ``mean``, bool.
            mean_key_share: As served by default.

        Returns:
            Like ``mean``; a row with nothing left has no mass.
        """
        by_mean, by_key = (
            torch.softmax(scores.masked_fill(dropped, -torch.inf), dim=-1).nan_to_num_(0.0)
            for scores in (self.mean, self.total)
        )
        return torch.lerp(by_key, by_mean, mean_key_share)


class TunedHead(Protocol):
    """Anything that has one head's thresholds."""

    @property
    def tau(self) -> float:
        """See ``HeadThresholds``."""

    @property
    def theta(self) -> float:
        """See ``HeadThresholds``."""


@dataclass(frozen=True)
class HeadThresholds:
    """The tuned thresholds of one layer's query heads, each ``[num_heads]``, fp32.

    Attributes:
        tau: Share of the blocks' mass to keep, in (0, 1]; 1 keeps every block.
        theta: Blocks less self-similar than this are always computed, in [-1, 1].
        has_guards: Whether any theta may be reached; False spares the device looking for blocks.
    """

    tau: torch.Tensor
    theta: torch.Tensor
    has_guards: bool = True

    @classmethod
    def of(cls, heads: Sequence[TunedHead]) -> "HeadThresholds":
        """Gathers the thresholds of single heads."""
        return cls(
            torch.tensor([head.tau for head in heads]),
            torch.tensor([head.theta for head in heads]),
            any(head.theta > THETA_OFF for head in heads),
        )

    def to(self, device: torch.device) -> "HeadThresholds":
        """The same on a device."""
        return replace(self, tau=self.tau.to(device), theta=self.theta.to(device))


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
        key: ``[length, num_kv_heads, head_dim]`` with ``length >= geometry.kv_len``, the context's.
        geometry: The step's blocks.
        softmax_scale: Factor of the scores.

    Returns:
        Scores and similarities, from which any thresholds select.
    """
    queries, (blocks, counts) = pool_queries(query, geometry), cut_keys(key, geometry)
    num_kv_heads, keys = len(blocks), blocks.float()
    pooled = queries.mean.float().unflatten(0, (num_kv_heads, -1)) * softmax_scale
    shape = (num_kv_heads, *pooled.shape[1:3], geometry.num_k_blocks)
    mean, total = (pooled.new_empty(shape) for _ in range(2))
    for head in range(num_kv_heads):  # all heads' scores at once would take gigabytes
        scores = pooled[head] @ keys[head].flatten(0, 1).T
        mean[head], total[head] = _reduce_scores(scores, geometry)
    invisible = ~geometry.visible.to(mean.device)
    return BlockScores(
        mean.flatten(0, 1).masked_fill_(invisible, -torch.inf),
        total.flatten(0, 1).masked_fill_(invisible, -torch.inf),
        queries.similarity,
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


def select_blocks(
    scores: BlockScores, thresholds: HeadThresholds, geometry: BlockGeometry
) -> torch.Tensor:
    """Chooses the key blocks that each query block of each head attends to.

    Args:
        scores: Of the request's blocks.
        thresholds: tau and theta of each query head.
        geometry: The step's blocks.

    Returns:
        ``[num_heads, num_q_blocks, num_k_blocks]`` bool, true where the block is computed.
        Sink, diagonal and local blocks are always kept, invisible ones never.
    """
    num_heads, group = len(scores.mean), len(scores.mean) // len(scores.key_similarity)
    visible, always = (m.to(scores.mean.device) for m in (geometry.visible, geometry.always))
    theta = thresholds.theta[:, None]
    unlike_keys = (scores.key_similarity.repeat_interleave(group, dim=0) < theta)[:, None, :]
    unlike_queries = (scores.query_similarity < theta)[:, :, None]
    keep = _smallest_set(scores.mass(unlike_keys), thresholds.tau.view(num_heads, 1, 1))
    return (keep | unlike_keys | unlike_queries | always) & visible


def _smallest_set(mass: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Marks the fewest entries of each row whose sum reaches tau, the crossing one included."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    # Rounded sums can reach 1 early, so tau = 1 is not left to them.
    needed = (before < tau) | (tau >= 1.0)
    return torch.zeros_like(needed).scatter_(-1, order, needed)
