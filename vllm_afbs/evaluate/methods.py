"""Ways to choose blocks, described by one number for each block.

A method reads one layer's queries and keys and gives each block a *level*. It has one *knob*, and
keeps the blocks whose levels lie below it; a larger knob keeps more. The knob for a given sparsity
follows from the levels themselves (``matching``).
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
    """What a method sees of one layer's attention to a whole prompt.

    Attributes:
        index: Index of the layer.
        query: ``[length, num_heads, head_dim]``.
        key: ``[length, num_kv_heads, head_dim]``.
        softmax_scale: Factor that the scores are multiplied by.
    """

    index: int
    query: torch.Tensor
    key: torch.Tensor
    softmax_scale: float

    @property
    def group(self) -> int:
        """Number of query heads that share a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def head_keys(self) -> torch.Tensor:
        """Keys for each query head, ``[num_heads, length, head_dim]``, fp32."""
        return self.key.float().transpose(0, 1).repeat_interleave(self.group, 0)

    def head_queries(self) -> torch.Tensor:
        """Queries times the scale, ``[num_heads, length, head_dim]``, fp32."""
        return self.query.float().transpose(0, 1) * self.softmax_scale


@dataclass(frozen=True)
class Method(ABC):
    """A way to choose blocks.

    Attributes:
        name: Name in the results.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        given: The knob that the method's authors or its tuner set; None if there is none.
        corrects: Whether a dropped block still counts as its mean key and mean value.
        min_length: Shorter prompts run dense.
        max_length: Longer prompts run dense.
    """

    name: str
    block_q: int = BLOCK
    block_k: int = BLOCK
    given: float | None = None
    corrects: bool = False
    min_length: int = 0
    max_length: float = math.inf

    def geometry(self, length: int) -> BlockGeometry:
        """Divides a prompt into blocks."""
        return BlockGeometry(length, length, self.block_q, self.block_k)

    def is_dense(self, layer: int, length: int) -> bool:
        """Whether a layer's attention to a prompt of this length stays dense."""
        return not self.min_length <= length <= self.max_length

    @abstractmethod
    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """Scores blocks by the method's definition: ``[num_heads, num_q_blocks, num_k_blocks]``."""

    def levels(self, layer: Layer) -> torch.Tensor:
        """Computes the levels of a layer's blocks.

        Every method keeps diagonal blocks at any knob, because a row must attend to itself.

        Returns:
            ``[num_heads, num_q_blocks, num_k_blocks]``, fp64; invisible blocks have the level inf.
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
        knob: Blocks with lower levels are kept.
    """

    method: Method
    knob: float

    def keep(self, layer: Layer) -> torch.Tensor:
        """Chooses blocks; returns a mask ``[num_heads, num_q_blocks, num_k_blocks]``, bool."""
        return self.method.levels(layer) < self.knob


def sink(levels: torch.Tensor) -> torch.Tensor:
    """Changes levels in place so that the first block is always kept."""
    levels[..., 0] = ALWAYS
    return levels


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Ranks the entries of each row, the largest first, from 0, int64."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def mass_before(mass: torch.Tensor) -> torch.Tensor:
    """Sums, for each entry, the mass of all larger entries of its row.

    The fewest entries that reach a share tau of the mass are those with a sum below tau.
    """
    ordered, order = mass.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(mass).scatter_(-1, order, ordered.cumsum(-1) - ordered)


def depth(share: torch.Tensor) -> torch.Tensor:
    """-log(1 - share) in fp64, inf if share >= 1: the scale that the tuner moves tau on."""
    return -torch.log1p(-share.double().clamp_max(1.0))
