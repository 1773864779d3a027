"""The selection rule's parameters: what is tuned for each head, and what is the same for all.

The rule is SpargeAttn's (arXiv 2502.18137, section 3) with two changes:

- Keys are not only pooled. The softmax over the blocks' mean keys, as in the paper, gives one half
  of a block's mass. The softmax over the keys themselves gives the other half: the sum of the
  block's weights. A mean hides a key that stands out from its block, and a mean query overrates
  such a key, so each half has what the other lacks. For the same error, heads skip nearly as much
  as with exact masses (docs/benchmarks.md). The second half takes one product of the
  pooled queries and all keys, which is ``1 / block_q`` of the products that dense attention takes
  to score.
- A block is scored by the keys that the query block's last row sees, and K is taken as it is. The
  paper subtracts the sequence's mean from K, which changes neither softmax. So selection is the
  same for every chunk size that keeps query and key blocks whole, and for prefix-cache hits. theta
  is tuned on the self-similarity of the same unsmoothed rows.

Where a model bounds its scores (soft-capping) or has sinks, blocks are scored without either. The
order of the scores is the same, and a sink would take the same share from every block of a row.

A block's *self-similarity* is the mean cosine over all pairs of its rows, each row with itself
included. A mean says little about rows that point apart, so theta sets such blocks aside: a key
block below theta takes no part in the softmax and is always computed, and a query block below
theta attends to all that it sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

THETA_OFF = -1.0
"""The theta that no block falls below: self-similarity lies in [0, 1] up to rounding."""

MEAN_KEY_SHARE = 0.5
"""Share of a block's mass that its mean key decides; its keys one by one decide the rest.

Chosen among 0, 0.5 and 1 on SmolLM2-135M: over 90 heads at 4K by error at equal density
(docs/benchmarks.md), and at 8K by perplexity. Other models were not measured.
"""


class TunedHead(Protocol):
    """One head's thresholds, in whatever record they are kept."""

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
        theta: Blocks whose self-similarity is below this are always computed, in [-1, 1].
        has_theta: Whether any head's theta is above ``THETA_OFF``; False saves the device the
            self-similarity of the keys.
    """

    tau: torch.Tensor
    theta: torch.Tensor
    has_theta: bool = True

    @classmethod
    def of(cls, heads: Sequence[TunedHead]) -> "HeadThresholds":
        """Gathers the thresholds of single heads."""
        return cls(
            torch.tensor([head.tau for head in heads]),
            torch.tensor([head.theta for head in heads]),
            any(head.theta > THETA_OFF for head in heads),
        )

    def to(self, device: torch.device) -> "HeadThresholds":
        """Copies the thresholds to a device."""
        return replace(self, tau=self.tau.to(device), theta=self.theta.to(device))
