"""Which rows and keys the blocks of one request's step cover."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

LOCAL_KEYS = 128
"""Keys before a query block's first row that are always kept, whatever the size of the blocks.

Chosen on SmolLM2-135M-Instruct. At 8K with blocks of 128, perplexity without them grew two to four
times as much at equal sparsity (docs/benchmarks.md). At 2K with blocks of 64, 128 keys were better
than 0 and than 256 by divergence at equal sparsity. A block's scores tell the mass of what is near,
not how much the next word depends on it. Other models were not measured.
"""

PAIRED_ROWS = 64
"""Query blocks of this size are scored in pairs, which halves what selection costs.

Both blocks of a pair take the scores of the mean of their 128 rows, each for the key blocks that it
sees. At equal error this keeps nearly all of what blocks of 64 save (docs/benchmarks.md).
"""


@dataclass(frozen=True)
class BlockGeometry:
    """One request's queries against its whole context, cut into blocks.

    Blocks are cut at absolute positions, so a prompt is cut alike however it is chunked: query
    block ``i`` of the prompt holds positions ``[i * block_q, (i + 1) * block_q)``, and a step
    sees the part of it that lies in its chunk. Attention is causal and aligned bottom-right: the
    last query row is the last key.

    Attributes:
        q_len: Query rows in this step.
        kv_len: Keys in the context, the step's own included.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        if not 0 < self.q_len <= self.kv_len:
            raise ValueError(
                f"q_len must be in [1, kv_len], got q_len={self.q_len}, kv_len={self.kv_len}"
            )
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(
                f"block sizes must be positive, got block_q={self.block_q}, block_k={self.block_k}"
            )

    @property
    def first_row(self) -> int:
        """Absolute position of the step's first query row."""
        return self.kv_len - self.q_len

    @property
    def lead(self) -> int:
        """Rows of the first query block that earlier steps have already computed."""
        return self.first_row % self.block_q

    @property
    def num_q_blocks(self) -> int:
        """Query blocks touched by this step."""
        return -(-(self.lead + self.q_len) // self.block_q)

    @property
    def num_k_blocks(self) -> int:
        """Key blocks of the context, the last one possibly partial."""
        return -(-self.kv_len // self.block_k)

    @cached_property
    def row_starts(self) -> torch.Tensor:
        """First row of each query block within the step, ``[num_q_blocks + 1]``, int64.

        The last entry is ``q_len``.
        """
        edges = torch.arange(self.num_q_blocks + 1) * self.block_q - self.lead
        return edges.clamp_(0, self.q_len)

    @cached_property
    def first_positions(self) -> torch.Tensor:
        """Absolute position of each query block's first row, ``[num_q_blocks]``, int64."""
        return self.row_starts[:-1] + self.first_row

    @cached_property
    def last_positions(self) -> torch.Tensor:
        """Absolute position of each query block's last row, ``[num_q_blocks]``, int64."""
        return self.row_starts[1:] + (self.first_row - 1)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Key blocks that causal attention reaches, ``[num_q_blocks, num_k_blocks]``, bool."""
        key_starts = torch.arange(self.num_k_blocks) * self.block_k
        return key_starts[None, :] <= self.last_positions[:, None]

    @cached_property
    def always(self) -> torch.Tensor:
        """Blocks that are never dropped, ``[num_q_blocks, num_k_blocks]``, bool.

        The first one (the attention sink: 64 keys in blocks of 64, 128 in blocks of 128), the
        diagonal ones, which some row of the query block sees only in part, and the ``local_keys``
        before them.
        """
        keep = self.local(self.local_keys)
        keep[:, 0] = True
        return keep & self.visible

    @property
    def local_keys(self) -> int:
        """Keys before a query block's first row that are always kept, rounded up to blocks.

        ``LOCAL_KEYS``, or as many as a query block has rows if it has fewer than half of them:
        such blocks are for short prompts.
        """
        return LOCAL_KEYS if 2 * self.block_q >= LOCAL_KEYS else self.block_q

    def local(self, reach: int) -> torch.Tensor:
        """Blocks that end within a reach of keys before a query block's first row, or after it.

        Args:
            reach: 0 for the diagonal blocks alone.

        Returns:
            ``[num_q_blocks, num_k_blocks]``, bool; invisible ones are among them.
        """
        key_ends = torch.arange(1, self.num_k_blocks + 1) * self.block_k
        return key_ends[None, :] > self.first_positions[:, None] + 1 - reach

    @property
    def scored(self) -> "BlockGeometry":
        """The query blocks whose means are scored: see ``PAIRED_ROWS``."""
        if self.block_q != PAIRED_ROWS:
            return self
        return replace(self, block_q=2 * self.block_q)

    @cached_property
    def scored_index(self) -> torch.Tensor:
        """The block of ``scored`` that holds each query block, ``[num_q_blocks]``, int64."""
        block_q = self.scored.block_q
        return self.first_positions // block_q - self.first_row // block_q

    @cached_property
    def num_visible(self) -> int:
        """Block products of dense causal attention for one head (of QK^T, and again of PV)."""
        return int(self.visible.sum())

    @property
    def num_scores(self) -> int:
        """Scores that dense causal attention computes for one head."""
        return self.q_len * (2 * self.kv_len - self.q_len + 1) // 2

    def pages_per_block(self, page_size: int) -> int:
        """Pages of a key block.

        Raises:
            ValueError: ``page_size`` does not divide ``block_k``.
        """
        if self.block_k % page_size:
            raise ValueError(
                f"page_size must divide block_k, got page_size={page_size}, block_k={self.block_k}"
            )
        return self.block_k // page_size
