"""Kept blocks as lists and as block tables.

A *tile* is one query block of one query head. Tiles are numbered head by head: tile
``head * num_q_blocks + index``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileLists:
    """Kept key blocks of the tiles of a request or a step, for a kernel that walks lists.

    Attributes:
        block_lists: Kept key blocks in ascending order, ``[num_tiles, longest]``, int32. What
            follows a tile's count is not read.
        counts: Kept blocks of each tile, ``[num_tiles]``, int32.
    """

    block_lists: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class TileTables:
    """Tiles as a batch of sequences with one head each, for a dense paged kernel.

    A tile's block table lists only the kept KV pages, in order. The diagonal pages come last, so
    bottom-right causal masking does the rest, and nothing in the dense kernel changes.

    Attributes:
        query_start_loc: ``[num_tiles + 1]``, int32, rows of the regrouped queries.
        seq_lens: Keys of each tile, ``[num_tiles]``, int32.
        block_table: ``[num_tiles, max_pages]``, int32, into the cache seen with one KV head
            (``one_head_view``), which says how its pages are numbered. Entries past a tile's keys
            are 0.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor

    def by_head(self, num_heads: int) -> Iterator["TileTables"]:
        """Yields the tiles of each head, whose rows then begin at 0.

        Args:
            num_heads: Query heads that the tiles are of, each with as many tiles and rows.
        """
        num_tiles = len(self.seq_lens) // num_heads
        for first in range(0, len(self.seq_lens), num_tiles):
            starts = self.query_start_loc[first : first + num_tiles + 1]
            own = slice(first, first + num_tiles)
            yield TileTables(starts - starts[0], self.seq_lens[own], self.block_table[own])


@dataclass(frozen=True)
class PackedTiles:
    """A step's queries regrouped into tiles, and the tiles' block tables.

    Attributes:
        query: ``[num_heads * num_rows, 1, head_dim]``, head by head, and within a head in the
            order of ``QueryBlocks``.
        tables: The tiles' sequences.
    """

    query: torch.Tensor
    tables: TileTables


DensePagedAttention = Callable[[torch.Tensor, torch.Tensor, TileTables], torch.Tensor | None]
"""Runs dense causal attention of ``query [num_rows, 1, head_dim]`` into ``output`` of its shape.

Returns the natural log-sum-exp of each row's scaled scores, ``[num_rows]``, fp32, or None if the
kernel gives none.
"""


def build_tile_lists(keep: torch.Tensor) -> TileLists:
    """Turns a mask of kept blocks into lists without a host synchronisation.

    Args:
        keep: ``[num_heads, num_q_blocks, num_k_blocks]`` bool.
    """
    flat = keep.flatten(0, 1)
    counts = flat.sum(-1, dtype=torch.int32)
    # False sorts before True, and a stable sort keeps the order of the context.
    lists = (~flat).to(torch.uint8).sort(dim=-1, stable=True).indices.to(torch.int32)
    return TileLists(lists, counts)
