"""XAttention: blocks scored by the sum of their antidiagonals (arXiv 2503.16428, section 2)."""

from dataclasses import dataclass

import torch

from vllm_afbs.evaluate.methods import Layer, Method, depth, mass_before, sink
from vllm_afbs.kernels import BlockGeometry

THRESHOLD = 0.9
"""The default of the authors' code."""


@dataclass(frozen=True)
class XAttention(Method):
    """Every ``stride``-th antidiagonal of a block.

    Queries and keys are cut into groups of ``stride`` rows. A group of queries in reverse order,
    multiplied by a group of keys in order, gives the sum over an antidiagonal of their tile. A
    softmax over the groups of keys and a sum over each block give the block's score. The first
    block and the diagonal come first, as in the authors' code. The knob is the depth of the
    threshold on the cumulative score.

    Attributes:
        stride: Rows of a group; the paper takes 8 for accuracy and 16 for speed.
    """

    stride: int = 8

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        query = self._groups(layer.head_queries()).flip(2).flatten(2)
        key = self._groups(layer.head_keys()).flatten(2)
        num_groups = key.shape[1]
        at = torch.arange(num_groups, device=key.device)
        scores = (query @ key.transpose(1, 2) / self.stride).masked_fill_(
            at[None, :] > at[:, None], -torch.inf
        )
        weights = torch.softmax(scores, -1)
        rows, columns = geometry.block_q // self.stride, geometry.block_k // self.stride
        padding = (0, -num_groups % columns, 0, -num_groups % rows)
        padded = torch.nn.functional.pad(weights, padding)
        sums = padded.unflatten(2, (-1, columns)).sum(-1).unflatten(1, (-1, rows)).sum(2)
        shares = sums / sums.sum(-1, keepdim=True)
        forced = geometry.local(0)
        forced[:, 0] = True
        forced = forced.to(shares.device)
        first = (shares * forced).sum(-1, keepdim=True)
        return sink(depth(mass_before(shares.masked_fill(forced, 0.0)) + first))

    def _groups(self, rows: torch.Tensor) -> torch.Tensor:
        """Cuts rows into groups of ``stride``, with zeros at the end of the last group."""
        missing = -rows.shape[1] % self.stride
        padded: torch.Tensor = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        return torch.unflatten(padded, 1, (-1, self.stride))
