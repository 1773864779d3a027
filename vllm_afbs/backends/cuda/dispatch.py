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
        variant: What else the layer had; see ``variant_name``.
    """

    head_dim: int
    num_heads: int
    kv_len: int
    density: float
    seconds: dict[KernelChoice, float]
    block_q: int = 128
    block_k: int = 128
    variant: str = ""

    @property
    def kind(self) -> "LayerKind":
        """The kind of layer that was measured."""
        return LayerKind(self.head_dim, self.block_q, self.block_k, self.variant)


def variant_name(is_fp8: bool, has_sinks: bool) -> str:
    """Names what changes a layer's times besides its shape; empty if nothing does.

    Args:
        is_fp8: Whether queries, keys and values are in FP8.
        has_sinks: Whether heads have sinks.
    """
    return "-".join(name for name, holds in {"fp8": is_fp8, "sinks": has_sinks}.items() if holds)


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer, by which measurements are chosen.

    Attributes:
        head_dim: Size of a head.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        variant: What else the layer has; see ``variant_name``.
    """

    head_dim: int
    block_q: int = 128
    block_k: int = 128
    variant: str = ""

    def distance(self, other: "LayerKind") -> tuple[float, float, float]:
        """How far another kind is: its variant, its heads and then its blocks, in octaves.

        A variant that was not measured is taken for the plain layer.
        """
        blocks = (self.block_q / other.block_q, self.block_k / other.block_k)
        variants = 0 if self.variant == other.variant else 2 if other.variant else 1
        return (
            variants,
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
    kind: LayerKind,
    kv_len: int,
    density: float,
    num_scores: int,
    kernels: Collection[KernelChoice] = KERNEL_CHOICES,
) -> KernelChoice:
    """Names the fastest kernel by the nearest measurements.

    Takes the measured kind of layer and context length that are nearest in proportion,
    interpolates between their densities, and scales the device's part with the number of scores.

    Args:
        card: The kind of card, which was measured.
        kind: The kind of layer.
        kv_len: Keys of the longest context of the step.
        density: Share of the causal block products expected to be computed, in (0, 1].
        num_scores: Scores that dense causal attention computes, over all heads.
        kernels: Kernels to choose among; those that were not measured are left out.
    """
    seconds = _seconds(card, kind, kv_len, round(density, 2), num_scores)
    measured = (kernel for kernel in KERNEL_CHOICES if kernel in kernels and kernel in seconds)
    return min(measured, key=lambda kernel: seconds[kernel])


def dense_seconds(card: str, kind: LayerKind, kv_len: int, num_scores: int) -> float:
    """Estimates the device's time for dense attention by the nearest measurements.

    On another device than the measured one, the estimate is wrong by the ratio between the two
    devices' speeds.

    Args:
        card: The kind of card; an H100 stands in for one that was not measured.
        kind: The kind of layer; its blocks do not matter.
        kv_len: Keys of the longest context of the step.
        num_scores: Scores that dense causal attention computes, over all heads.
    """
    measured = card if card in measurements() else _ESTIMATED_BY
    by_kernel = _seconds_per_score(measured, kind, _half_octaves(kv_len), 1.0)
    return by_kernel["dense"] * num_scores


def _half_octaves(kv_len: int) -> int:
    # Rounded, so that the chunks of a long prompt share cached results.
    return round(2 * math.log2(kv_len))


def _seconds(
    card: str, kind: LayerKind, kv_len: int, density: float, num_scores: float
) -> dict[KernelChoice, float]:
    """What each measured kernel takes the device and the host together."""
    device = _seconds_per_score(card, kind, _half_octaves(kv_len), density)
    host = measurements()[card].host_seconds
    return {kernel: each * num_scores + host[kernel] for kernel, each in device.items()}


@functools.lru_cache(maxsize=4096)
def _seconds_per_score(
    card: str, kind: LayerKind, half_octaves: int, density: float
) -> dict[KernelChoice, float]:
    rows = measurements()[card].rows
    nearest = min((row.kind for row in rows), key=kind.distance)
    rows = tuple(row for row in rows if row.kind == nearest)
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


def prefill_seconds(
    card: str, kind: LayerKind, num_heads: int, kv_len: int, density: float
) -> float:
    """Predicts what one layer's prefill of a whole prompt takes the fastest kernel, host included.

    Args:
        card: The kind of card, which was measured.
        kind: The kind of layer.
        num_heads: Query heads.
        kv_len: Tokens of the prompt.
        density: Share of the causal block products that is computed, in (0, 1]; 1 is dense.
    """
    num_scores = num_heads * kv_len * (kv_len + 1) / 2
    seconds = _seconds(card, kind, kv_len, round(density, 3), num_scores)
    return seconds["dense"] if density >= 1.0 else min(seconds.values())
