"""Which way is fastest for a layer's step, by measurements kept beside this file.

``measured.json`` is written by ``python -m benchmarks.prefill_gpu --dispatch FILE`` on
an H100: what one layer's prefill of a whole prompt, selection included, takes the device, and what
issuing it takes the host.

A step is bound by its device or, where a model is small, by its host. Which one is not known here,
so a way has to be better by the sum: what it saves the device must exceed what it costs the host.
"""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from vllm_afbs.files import write_atomically

Way = Literal["dense", "tiles", "triton"]
WAYS: tuple[Way, ...] = get_args(Way)
MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measurement:
    """The device's seconds of each way for one head size, context length and density.

    Attributes:
        head_dim: Size of a head.
        num_heads: Query heads.
        kv_len: Tokens of the prompt.
        density: Share of the causal block products that is computed.
        seconds: Median by way.
    """

    head_dim: int
    num_heads: int
    kv_len: int
    density: float
    seconds: dict[Way, float]


@dataclass(frozen=True)
class Measurements:
    """All that the dispatcher knows.

    Attributes:
        host_seconds: What issuing a layer's prefill takes the host, by way.
        rows: The device's part.
    """

    host_seconds: dict[Way, float]
    rows: tuple[Measurement, ...]

    @classmethod
    def read(cls, path: Path) -> "Measurements":
        """Reads a file of measurements."""
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(Measurement(**row) for row in content["rows"])
        return cls(content["host_seconds"], rows)

    def write(self, path: Path) -> None:
        """Writes them, a row a line."""
        lines = ",\n  ".join(json.dumps(asdict(row)) for row in self.rows)
        host_seconds = json.dumps(self.host_seconds)
        write_atomically(path, f'{{"host_seconds": {host_seconds},\n "rows": [\n  {lines}]}}\n')

    def updated(
        self, host_seconds: dict[Way, float], rows: Sequence[Measurement]
    ) -> "Measurements":
        """With the host's part replaced, and the rows of the head sizes that ``rows`` holds."""
        sizes = {row.head_dim for row in rows}
        kept = (row for row in self.rows if row.head_dim not in sizes)
        return Measurements(host_seconds, (*kept, *rows))


@functools.cache
def measurements() -> Measurements:
    """The measurements in the repository."""
    return Measurements.read(MEASURED)


def fastest_way(head_dim: int, kv_len: int, density: float, num_scores: int) -> Way:
    """Names the way that the measurements nearest to these figures find fastest.

    The nearest head size and (in proportion) context length are taken; between their densities
    times are interpolated, and the device's part grows with the step's scores.

    Args:
        head_dim: Size of a head.
        kv_len: Keys of the longest context of the step.
        density: Share of the causal block products expected to be computed, in (0, 1].
        num_scores: Scores that dense causal attention computes, over all heads.
    """
    device = _seconds_per_score(head_dim, _half_octaves(kv_len), round(density, 2))
    host = measurements().host_seconds
    return min(WAYS, key=lambda way: device[way] * num_scores + host[way])


def dense_seconds(head_dim: int, kv_len: int, num_scores: int) -> float:
    """Estimates the device's time for dense attention from the measurements nearest to these.

    They were made on an H100: on another device the estimate is off by as much as its dense
    attention is faster or slower.

    Args:
        head_dim: Size of a head.
        kv_len: Keys of the longest context of the step.
        num_scores: Scores that dense causal attention computes, over all heads.
    """
    return _seconds_per_score(head_dim, _half_octaves(kv_len), 1.0)["dense"] * num_scores


def _half_octaves(kv_len: int) -> int:
    # Rounded, so that a long prompt's chunks share what is looked up.
    return round(2 * math.log2(kv_len))


@functools.lru_cache(maxsize=4096)
def _seconds_per_score(head_dim: int, half_octaves: int, density: float) -> dict[Way, float]:
    rows = measurements().rows
    size = min({row.head_dim for row in rows}, key=lambda each: abs(math.log(each / head_dim)))
    rows = tuple(row for row in rows if row.head_dim == size)
    lengths = {row.kv_len for row in rows}
    length = min(lengths, key=lambda each: abs(math.log2(each) - half_octaves / 2))
    curve = sorted((r for r in rows if r.kv_len == length), key=lambda row: row.density)
    num_scores = curve[0].num_heads * length * (length + 1) / 2
    return {way: _interpolate(curve, way, density) / num_scores for way in WAYS}


def _interpolate(rows: list[Measurement], way: Way, density: float) -> float:
    points = [(row.density, row.seconds[way]) for row in rows]
    if density <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in itertools.pairwise(points):
        if density <= high:
            return below + (above - below) * (density - low) / (high - low)
    return points[-1][1]
