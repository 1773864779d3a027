"""Which parts of large files are read.

Up to ``MAX_CHARACTERS`` bytes are read whole. A larger file, or a folder's files taken as one, is
divided into ``NUM_PARTS`` equal parts, and the beginning of each part is read. What was read keeps
the file's order, so windows cut from it lie about where they would lie in the whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

MAX_CHARACTERS = 1 << 24
"""Characters taken of a text: several windows of a million tokens."""
MAX_BYTES = 1 << 27
"""Bytes read for them from rows, which may hold much besides the text."""
MAX_ROW_BYTES = 1 << 26
"""Bytes of one row."""
BYTES_PER_ROW = 1 << 8
"""Counted for each row besides, since millions of empty ones take their time, too."""
NUM_PARTS = 5
"""Held-out windows begin at a quarter, a half or three quarters of the text (``windows.py``). With
five parts, that is inside a part, not where two parts meet."""


@dataclass(frozen=True)
class Span:
    """Bytes of a file.

    Attributes:
        path: The file.
        start: Offset of the first byte.
        stop: Offset after the last byte; None where the file does not say its size (a pipe, a
            compressed file): up to its end.
    """

    path: Path
    start: int
    stop: int | None


@dataclass
class Budget:
    """How much of a part may still be read; counts down.

    Attributes:
        characters: Of text.
        num_bytes: Of the file.
    """

    characters: int
    num_bytes: int

    @classmethod
    def of_one_part(cls, num_parts: int) -> "Budget":
        """An equal share of what may be read of a text."""
        return cls(MAX_CHARACTERS // num_parts, MAX_BYTES // num_parts)

    @property
    def spent(self) -> bool:
        """Whether nothing more is to be read."""
        return self.characters <= 0 or self.num_bytes <= 0


def divide(files: Sequence[tuple[Path, int | None]]) -> list[list[Span]]:
    """Divides files, one after another, into parts.

    Args:
        files: Each with its size in bytes, None if unknown.

    Returns:
        The spans of each part. There is one part if everything may be read, or if a size is
        unknown, since such a file can only be read from its start.
    """
    sizes = [size for _, size in files if size is not None]
    total = sum(sizes)
    if len(sizes) < len(files) or total <= MAX_CHARACTERS:
        return [[Span(path, 0, size) for path, size in files]]
    bounds = [total * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    starts = [0, *accumulate(sizes)]
    return [
        [
            Span(path, max(first - start, 0), min(last - start, size))
            for (path, _), start, size in zip(files, starts, sizes, strict=False)
            if start < last and first < start + size
        ]
        for first, last in pairwise(bounds)
    ]


def describe(num_bytes: int) -> str:
    """A size for people."""
    size, unit = float(num_bytes), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.4g} {unit}"
