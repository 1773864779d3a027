"""What a way of choosing blocks is here: for every block, the knob at which it joins.

A method reads one layer's queries and keys and gives each block a *level*. It keeps the blocks
whose level lies below its one *knob*, so a larger knob keeps more, and the knob that leaves a given
sparsity is read off the levels themselves (``matching``).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_afbs.kernels import BlockGeometry

BLOCK = 128
ALWAYS = -torch.inf
NEVER = torch.inf


@dataclass(frozen=True)
class Layer:
    """One layer's attention to a whole prompt, as a method sees it.

    Attributes:
        index: Of the layer.
        query: ``[length, num_heads, head_dim]``.
        key: ``[length, num_kv_heads, head_dim]``.
        softmax_scale: Factor of the scores.
    """

    index: int
    query: torch.Tensor
    key: torch.Tensor
    softmax_scale: float

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def head_keys(self) -> torch.Tensor:
        """Keys by query head, ``[num_heads, length, head_dim]``, fp32."""
        return self.key.float().transpose(0, 1).repeat_interleave(self.group, 0)

    def head_queries(self) -> torch.Tensor:
        """Queries times the scale, ``[num_heads, length, head_dim]``, fp32."""
        return self.query.float().transpose(0, 1) * self.softmax_scale


@dataclass(frozen=True)
class Method(ABC):
    """A way to choose blocks.

    Attributes:
        name: What results call it.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        given: The knob that its authors set, or its tuner; None where there is none.
        corrects: Whether a dropped block still counts as its mean key and mean value.
        min_length: Shorter prompts run dense.
        max_length: So do longer ones.
    """

    name: str
    block_q: int = BLOCK
    block_k: int = BLOCK
    given: float | None = None
    corrects: bool = False
    min_length: int = 0
    max_length: float = math.inf

    def geometry(self, length: int) -> BlockGeometry:
        """The blocks of a prompt."""
        return BlockGeometry(length, length, self.block_q, self.block_k)

    def is_dense(self, layer: int, length: int) -> bool:
        """Whether a layer's attention to a prompt of this length is left as it is."""
        return not self.min_length <= length <= self.max_length

    @abstractmethod
    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """The levels that the definition gives, ``[num_heads, num_q_blocks, num_k_blocks]``."""

    def levels(self, layer: Layer) -> torch.Tensor:
        """The levels of a layer's blocks.

        Diagonal blocks join at any knob whatever the method: a row must attend to itself.

        Returns:
            ``[num_heads, num_q_blocks, num_k_blocks]``, fp64; those of invisible blocks are inf.
        """
        geometry = self.geometry(len(layer.query))
        levels = self.score(layer, geometry).double()
        levels = levels.masked_fill(geometry.local(0).to(levels.device), ALWAYS)
        return levels.masked_fill_(~geometry.visible.to(levels.device), NEVER)


@dataclass(frozen=True)
class Selection:
    """A method with its knob set.

    Attributes:
        method: The method.
        knob: Blocks of lower level are kept.
    """

    method: Method
    knob: float

    def keep(self, layer: Layer) -> torch.Tensor:
        """The kept blocks, ``[num_heads, num_q_blocks, num_k_blocks]``, bool."""
        return self.method.levels(layer) < self.knob


def sink(levels: torch.Tensor) -> torch.Tensor:
    """The levels with the first block always kept, in place."""
    levels[..., 0] = ALWAYS
    return levels


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Place of each entry in its row, the largest first, ``int64``."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def mass_before(mass: torch.Tensor) -> torch.Tensor:
    """Mass of the entries of a row that come before each one, the largest first.

    The fewest entries that reach a share tau of the mass are those with less than tau before them.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(mass).scatter_(-1, order, ordered.cumsum(-1) - ordered)


def depth(share: torch.Tensor) -> torch.Tensor:
    """-log(1 - share) in fp64, inf from 1 on: the scale that tau is moved on (tuning.bracket)."""
    return -torch.log1p(-share.double().clamp_max(1.0))
