"""The query blocks of a step's long prefills, as one table that kernels on a device walk.

All that a kernel needs of a request is its row of the block table, which this table holds, so one
launch serves a batch of any lengths, chunked or not. ``BlockGeometry`` stays the only place that
says where blocks are cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vllm_afbs.kernels.geometry import BlockGeometry


@dataclass(frozen=True)
class PrefillRequest:
    """One long prefill of a step.

    Attributes:
        first_row: Its first row among the step's tokens.
        table_row: Its row of the block table.
        geometry: Its blocks.
    """

    first_row: int
    table_row: int
    geometry: BlockGeometry

    @property
    def rows(self) -> slice:
        """Its rows among the step's tokens."""
        return slice(self.first_row, self.first_row + self.geometry.q_len)


@dataclass(frozen=True)
class QueryBlocks:
    """Query blocks of all requests of a step, request by request, longest context first.

    Within a request the blocks go from the last to the first. So the longest tiles start first;
    otherwise they would end last, with the rest of the device idle.

    Attributes:
        table: ``[5, num_blocks]``, int32, by row: the block's first row among the step's tokens;
            its number of rows; the absolute position of its first row; the rows of the blocks
            before it (its place once blocks are packed one after another); its request's row of
            the block table.
        requests: The requests, in the table's order.
        slices: Each request's blocks.
        num_rows: Rows of all blocks.
        pairs: The blocks that are scored, if they are not these: see ``BlockGeometry.scored``.
    """

    table: torch.Tensor
    requests: tuple[PrefillRequest, ...]
    slices: tuple[slice, ...]
    num_rows: int
    pairs: "QueryBlocks | None" = None

    @property
    def scored(self) -> "QueryBlocks":
        """The blocks whose means are scored."""
        return self if self.pairs is None else self.pairs

    @property
    def num_blocks(self) -> int:
        """Query blocks of the step; every head has as many tiles."""
        return self.table.shape[1]

    @property
    def block_q(self) -> int:
        """Rows of a whole query block."""
        return self.requests[0].geometry.block_q

    @property
    def block_k(self) -> int:
        """Keys of a whole key block."""
        return self.requests[0].geometry.block_k

    @property
    def max_k_blocks(self) -> int:
        """Key blocks of the longest context."""
        return max(request.geometry.num_k_blocks for request in self.requests)

    @property
    def num_visible(self) -> int:
        """Block products of dense causal attention for one head (of QK^T, and again of PV)."""
        return sum(request.geometry.num_visible for request in self.requests)

    @property
    def num_scores(self) -> int:
        """Scores that dense causal attention computes for one head."""
        return sum(request.geometry.num_scores for request in self.requests)


def cut_query_blocks(requests: Sequence[PrefillRequest], device: torch.device) -> QueryBlocks:
    """Lists the query blocks of a step's long prefills.

    Args:
        requests: At least one; all with the same block sizes.
        device: Where kernels will read the table.

    Raises:
        ValueError: There is no request, or block sizes differ.
    """
    sizes = {(request.geometry.block_q, request.geometry.block_k) for request in requests}
    if len(sizes) != 1:
        raise ValueError(f"requests with one pair of block sizes expected, got {sizes}")
    ordered = tuple(sorted(requests, key=lambda request: -request.geometry.kv_len))
    parts, slices, start = [], [], 0
    for request in ordered:
        geometry = request.geometry
        first_rows, counts = geometry.row_starts[:-1], geometry.row_starts.diff()
        part = torch.zeros(5, geometry.num_q_blocks, dtype=torch.int64)
        part[0] = first_rows + request.first_row
        part[1] = counts
        part[2] = geometry.first_positions
        part[4] = request.table_row
        parts.append(part.flip(1))
        slices.append(slice(start, start + geometry.num_q_blocks))
        start += geometry.num_q_blocks
    table = torch.cat(parts, dim=1)
    table[3] = table[1].cumsum(0) - table[1]
    num_rows = sum(request.geometry.q_len for request in ordered)
    scored = [replace(request, geometry=request.geometry.scored) for request in ordered]
    pairs = cut_query_blocks(scored, device) if scored != list(ordered) else None
    on_device = to_device(table.to(torch.int32), device)
    return QueryBlocks(on_device, ordered, tuple(slices), num_rows, pairs)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Enqueues a copy, for which the host does not wait: from pageable memory it would."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
