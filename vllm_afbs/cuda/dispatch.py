"""Which way is fastest for a layer's step, by measurements kept beside this file.

``measured.json`` is written by ``python -m vllm_afbs.benchmarks.prefill_gpu --dispatch FILE``:
seconds of one layer's prefill of a whole prompt, selection included, on an H100.
"""

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from vllm_afbs.profile import write_atomically

Way = Literal["dense", "tiles", "triton"]
WAYS: tuple[Way, ...] = get_args(Way)
MEASURED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Measurement:
    """Seconds of each way for one head size, context length and density.

    Attributes:
        head_dim: Size of a head.
        kv_len: Tokens of the prompt.
        density: Share of the causal block products that is computed.
        seconds: Median by way.
    """

    head_dim: int
    kv_len: int
    density: float
    seconds: dict[Way, float]


def read_measurements(path: Path) -> tuple[Measurement, ...]:
    """Reads a file of measurements."""
    return tuple(Measurement(**row) for row in json.loads(path.read_text(encoding="utf-8")))


def update_measurements(path: Path, new: Sequence[Measurement]) -> None:
    """Replaces a file's measurements of the head sizes that ``new`` holds; others stay."""
    sizes = {row.head_dim for row in new}
    known = read_measurements(path) if path.exists() else ()
    rows = [*(row for row in known if row.head_dim not in sizes), *new]
    lines = ",\n ".join(json.dumps(asdict(row)) for row in rows)
    write_atomically(path, f"[{lines}]\n")


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """The measurements in the repository."""
    return read_measurements(MEASURED)


@functools.lru_cache(maxsize=4096)
def fastest_way(head_dim: int, kv_len: int, density: float) -> Way:
    """Names the way that the measurements nearest to these figures find fastest.

    The nearest head size and (in proportion) context length are taken; between their densities
    times are interpolated.

    Args:
        head_dim: Size of a head.
        kv_len: Keys of the longest context of the step.
        density: Share of the causal block products expected to be computed, in (0, 1].
    """
    known = measurements()
    size = min({row.head_dim for row in known}, key=lambda each: abs(math.log(each / head_dim)))
    known = tuple(row for row in known if row.head_dim == size)
    length = min({row.kv_len for row in known}, key=lambda each: abs(math.log(each / kv_len)))
    rows = sorted((r for r in known if r.kv_len == length), key=lambda row: row.density)
    return min(WAYS, key=lambda way: _interpolate(rows, way, density))


def _interpolate(rows: list[Measurement], way: Way, density: float) -> float:
    points = [(row.density, row.seconds[way]) for row in rows]
    if density <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in itertools.pairwise(points):
        if density <= high:
            return below + (above - below) * (density - low) / (high - low)
    return points[-1][1]
