"""Chooses the fastest kernel for a layer's step, by the measurements in ``measured.json``.

``python -m benchmarks.prefill_gpu --dispatch FILE`` writes that file. It holds, for each kind of
card that was measured, what one layer's prefill of a whole prompt costs the device, selection
included, and what issuing it costs the host.

A step is bound by its device or, if the model is small, by its host. Which of the two is not known
here, so kernels are compared by the sum: a kernel must save the device more than it costs the host.
"""

import functools
import itertools
import json
import logging
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

logger = logging.getLogger("vllm.afbs")

KernelChoice = Literal["dense", "tiles", "triton"]
"""vLLM's dense FlashAttention, FlashAttention 3 over tiles, or our Triton kernel."""

KERNEL_CHOICES: tuple[KernelChoice, ...] = get_args(KernelChoice)
MEASURED = Path(__file__).with_name("measured.json")
_ESTIMATED_BY = "sm90-fa3"
"""Whose measurements estimate dense attention on a card that was not measured."""


@dataclass(frozen=True)
class Measurement:
    """What each kernel takes the device for one shape of tiles, context length and density.

    Attributes:
        head_dim: Size of a head.
        num_heads: Query heads.
        kv_len: Tokens of the prompt.
        density: Share of the causal block products that is computed.
        seconds: Median by kernel.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """

    head_dim: int
    num_heads: int
    kv_len: int
    density: float
    seconds: dict[KernelChoice, float]
    block_q: int = 128
    block_k: int = 128

    @property
    def tile(self) -> "Tile":
        """Its shape of tiles."""
        return Tile(self.head_dim, self.block_q, self.block_k)


@dataclass(frozen=True)
class Tile:
    """A shape of tiles, by which measurements are chosen.

    Attributes:
        head_dim: Size of a head.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """

    head_dim: int
    block_q: int = 128
    block_k: int = 128

    def distance(self, other: "Tile") -> tuple[float, float]:
        """How far another shape is, in octaves: its heads, and then its blocks."""
        blocks = (self.block_q / other.block_q, self.block_k / other.block_k)
        return (
            abs(math.log2(self.head_dim / other.head_dim)),
            sum(abs(math.log2(ratio)) for ratio in blocks),
        )


@dataclass(frozen=True)
class Measurements:
    """All measurements of a kind of card.

    Attributes:
        host_seconds: What issuing a layer's prefill takes the host, by each kernel that it has.
        rows: What it takes the device.
    """

    host_seconds: dict[KernelChoice, float]
    rows: tuple[Measurement, ...]

    @classmethod
    def read(cls, path: Path) -> dict[str, "Measurements"]:
        """Reads a file of measurements, by ``Card.name``."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            card: cls(each["host_seconds"], tuple(Measurement(**row) for row in each["rows"]))
            for card, each in content.items()
        }


@functools.cache
def measurements() -> dict[str, Measurements]:
    """The measurements in the repository, by ``Card.name``."""
    return Measurements.read(MEASURED)


@functools.cache
def is_measured(card: str) -> bool:
    """Whether this kind of card was measured; if not, says so once in the log."""
    known = measurements()
    if card not in known:
        logger.warning(
            "Attention runs dense: %s lists %s, not %s (compute capability and FlashAttention "
            "version). To run sparse, measure this GPU with `python -m benchmarks.prefill_gpu "
            "--dispatch` (docs/operations.md).",
            MEASURED, ", ".join(known), card,
        )  # fmt: skip
    return card in known


def fastest_kernel(
    card: str,
    tile: Tile,
    kv_len: int,
    density: float,
    num_scores: int,
    kernels: Collection[KernelChoice] = KERNEL_CHOICES,
) -> KernelChoice:
    """Names the fastest kernel by the nearest measurements.

    Takes the measured head size, blocks and context length that are nearest in proportion,
    interpolates between their densities, and scales the device's part with the number of scores.

    Args:
        card: The kind of card, which was measured.
        tile: The layer's shape of tiles.
        kv_len: Keys of the longest context of the step.
        density: Share of the causal block products expected to be computed, in (0, 1].
        num_scores: Scores that dense causal attention computes, over all heads.
        kernels: Kernels to choose among; those that were not measured are left out.
    """
    device = _seconds_per_score(card, tile, _half_octaves(kv_len), round(density, 2))
    host = measurements()[card].host_seconds
    measured = (kernel for kernel in KERNEL_CHOICES if kernel in kernels and kernel in device)
    return min(measured, key=lambda kernel: device[kernel] * num_scores + host[kernel])


def dense_seconds(card: str, head_dim: int, kv_len: int, num_scores: int) -> float:
    """Estimates the device's time for dense attention by the nearest measurements.

    On another device than the measured one, the estimate is wrong by the ratio between the two
    devices' speeds.

    Args:
        card: The kind of card; an H100 stands in for one that was not measured.
        head_dim: Size of a head.
        kv_len: Keys of the longest context of the step.
        num_scores: Scores that dense causal attention computes, over all heads.
    """
    measured = card if card in measurements() else _ESTIMATED_BY
    by_kernel = _seconds_per_score(measured, Tile(head_dim), _half_octaves(kv_len), 1.0)
    return by_kernel["dense"] * num_scores


def _half_octaves(kv_len: int) -> int:
    # Rounded, so that the chunks of a long prompt share cached results.
    return round(2 * math.log2(kv_len))


@functools.lru_cache(maxsize=4096)
def _seconds_per_score(
    card: str, tile: Tile, half_octaves: int, density: float
) -> dict[KernelChoice, float]:
    rows = measurements()[card].rows
    nearest = min((row.tile for row in rows), key=tile.distance)
    rows = tuple(row for row in rows if row.tile == nearest)
    lengths = {row.kv_len for row in rows}
    length = min(lengths, key=lambda each: abs(math.log2(each) - half_octaves / 2))
    curve = sorted((r for r in rows if r.kv_len == length), key=lambda row: row.density)
    num_scores = curve[0].num_heads * length * (length + 1) / 2
    return {
        kernel: _interpolate(curve, kernel, density) / num_scores for kernel in curve[0].seconds
    }


def _interpolate(rows: list[Measurement], kernel: KernelChoice, density: float) -> float:
    points = [(row.density, row.seconds[kernel]) for row in rows]
    if density <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in itertools.pairwise(points):
        if density <= high:
            return below + (above - below) * (density - low) / (high - low)
    return points[-1][1]
