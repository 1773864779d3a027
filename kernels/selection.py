"""Choosing key blocks: pooled scores, the mass threshold tau and the similarity guard theta.

The rule is SpargeAttn's (arXiv 2502.18137, section 3) with one change: K is pooled as it is,
not after subtracting its mean over the sequence. The softmax of the pooled scores does not
change (the mean adds one constant to a row), and a page's statistics then depend on that page
alone, so selection is the same for every chunk size and for prefix-cache hits. theta is tuned
on the same unsmoothed similarity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_afbs.kernels.geometry import BlockGeometry

THETA_OFF = -1.0
"""Similarities lie in [0, 1] up to rounding, so no block is ever below this theta."""


@dataclass(frozen=True)
class BlockStats:
    """What selection knows of a row of blocks.

    Attributes:
        mean: Mean of each block's rows, ``[num_heads, num_blocks, head_dim]``, fp32.
        similarity: Mean pairwise cosine of each block's rows, ``[num_heads, num_blocks]``, fp32.
    """

    mean: torch.Tensor
    similarity: torch.Tensor


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
        tau: Mass of pooled attention to keep, in (0, 1]; 1 keeps every block.
        theta: Blocks less self-similar than this are always computed, in [-1, 1].
    """

    tau: torch.Tensor
    theta: torch.Tensor

    @classmethod
    def of(cls, heads: Sequence[TunedHead]) -> "HeadThresholds":
        """Gathers the thresholds of single heads."""
        return cls(
            torch.tensor([head.tau for head in heads]),
            torch.tensor([head.theta for head in heads]),
        )

    def to(self, device: torch.device) -> "HeadThresholds":
        """The same on a device."""
        return HeadThresholds(self.tau.to(device), self.theta.to(device))


def pool_blocks(rows: torch.Tensor, counts: torch.Tensor) -> BlockStats:
    """Reduces blocks of rows to their mean and their self-similarity.

    The mean pairwise cosine of n rows, each with itself included, is the squared length of the
    mean of the normalised rows, so it costs one more reduction rather than n^2 products.

    Args:
        rows: ``[num_heads, num_blocks, block, head_dim]``, any float dtype; rows past a block's
            count must be finite and are ignored.
        counts: Rows present in each block, ``[num_blocks]``, int.

    Returns:
        The blocks' statistics in fp32.
    """
    block = rows.shape[2]
    present = (torch.arange(block, device=rows.device)[None, :] < counts[:, None]).float()
    weights = (present / counts[:, None])[None, :, None, :]
    values = rows.float()
    inverse_norms = torch.linalg.vector_norm(values, dim=-1).clamp_min_(1e-12).reciprocal_()
    mean = weights @ values
    direction = (weights * inverse_norms[:, :, None, :]) @ values
    return BlockStats(mean.squeeze(2), direction.square().sum(-1).squeeze(2))


def pool_queries(query: torch.Tensor, geometry: BlockGeometry) -> BlockStats:
    """Pools a step's query rows into the blocks that ``geometry`` cuts.

    Args:
        query: ``[q_len, num_heads, head_dim]``.
        geometry: The step's blocks.

    Returns:
        Statistics of ``geometry.num_q_blocks`` blocks per query head.
    """
    q_len, num_heads, head_dim = query.shape
    num_blocks, block = geometry.num_q_blocks, geometry.block_q
    # Rows are packed to the front of their block: the first block's may begin mid-block.
    first = int(geometry.row_starts[1])
    padded = query.new_zeros(num_heads, num_blocks * block, head_dim)
    by_head = query.transpose(0, 1)
    padded[:, :first] = by_head[:, :first]
    padded[:, block : block + q_len - first] = by_head[:, first:]
    return pool_blocks(
        padded.view(num_heads, num_blocks, block, head_dim),
        geometry.row_starts.diff().to(query.device),
    )


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


def select_blocks(
    queries: BlockStats,
    keys: BlockStats,
    thresholds: HeadThresholds,
    geometry: BlockGeometry,
    softmax_scale: float,
) -> torch.Tensor:
    """Chooses the key blocks that each query block of each head attends to.

    Args:
        queries: Statistics of the step's query blocks, ``num_heads`` heads.
        keys: Statistics of the context's key blocks, ``num_kv_heads`` heads.
        thresholds: tau and theta of each query head.
        geometry: The step's blocks.
        softmax_scale: Factor of the scores.

    Returns:
        ``[num_heads, num_q_blocks, num_k_blocks]`` bool, true where the block is computed.
        Sink, diagonal and local blocks are always kept, invisible ones never.
    """
    num_heads, group = len(queries.mean), len(queries.mean) // len(keys.mean)
    visible, always = (m.to(keys.mean.device) for m in (geometry.visible, geometry.always))
    theta = thresholds.theta[:, None]
    key_means = keys.mean.repeat_interleave(group, dim=0)
    unlike_keys = (keys.similarity.repeat_interleave(group, dim=0) < theta)[:, None, :]
    unlike_queries = (queries.similarity < theta)[:, :, None]

    scores = (queries.mean @ key_means.transpose(1, 2)) * softmax_scale
    scores.masked_fill_(unlike_keys | ~visible, -torch.inf)
    # A row may have no pooled key left (all unlike): its mass is then zero, not NaN.
    mass = torch.softmax(scores, dim=-1).nan_to_num_(0.0)
    keep = _smallest_set(mass, thresholds.tau.view(num_heads, 1, 1))
    return (keep | unlike_keys | unlike_queries | always) & visible


def _smallest_set(mass: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """Marks the fewest entries of each row whose sum reaches tau, the crossing one included."""
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    # Rounded sums can reach 1 early, so tau = 1 is not left to them.
    needed = (before < tau) | (tau >= 1.0)
    return torch.zeros_like(needed).scatter_(-1, order, needed)
