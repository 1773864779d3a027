"""Plain UTF-8 text: a file, or a folder of source files."""

import codecs
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts.spread import MAX_CHARACTERS, NUM_PARTS, Span, describe, divide

SEPARATOR = "\n\n"
"""Between the files of a folder, the rows of a data set and the parts of a large file."""
_SNIFFED_BYTES = 1 << 13
_LONGEST_LINE = 1 << 16


def size_of(path: Path) -> int | None:
    """A file's size in bytes; None for a pipe or a file that does not tell."""
    status = path.stat()
    return status.st_size or None if stat.S_ISREG(status.st_mode) else None


def read_file(path: Path) -> tuple[str, str | None]:
    """A file's text, and which part of it that is (None: all of it).

    Raises:
        OSError: It cannot be read.
        InputError: It is not UTF-8 text.
    """
    size = size_of(path)
    parts = divide([(path, size)])
    pieces = []
    for (span,) in parts:
        data, more = _read(span, MAX_CHARACTERS // len(parts))
        try:
            pieces.append(_decode(data))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: cannot read the calibration text: UTF-8 text expected "
                f"(byte {span.start + error.start}: {error.reason})"
            ) from None
    if len(parts) > 1 and size is not None:
        return SEPARATOR.join(pieces), _spread(size)
    coverage = f"the first {describe(MAX_CHARACTERS)}" if size is None and more else None
    return pieces[0], coverage


def read_files(files: Sequence[Path]) -> tuple[str, int, str | None]:
    """The text of those files that are text.

    Returns:
        The text, how many files are not text (binary or not UTF-8), and which part of the text
        files was read (None: all).

    Raises:
        OSError: A file cannot be read.
    """
    texts = [path for path in files if _looks_like_text(path)]
    sizes = [path.stat().st_size for path in texts]
    parts = divide(list(zip(texts, sizes, strict=True)))
    pieces, binary = [], set(files) - set(texts)
    for span, limit in _within_limits(parts):
        data, _ = _read(span, limit)
        try:
            pieces.append(_decode(data))
        except UnicodeDecodeError:
            binary.add(span.path)
    text = SEPARATOR.join(piece for piece in pieces if piece)
    return text, len(binary), _spread(sum(sizes)) if len(parts) > 1 else None


def _within_limits(parts: list[list[Span]]) -> Iterator[tuple[Span, int]]:
    """The spans to be read of each part, and how many bytes of each at most."""
    for part in parts:
        limit = MAX_CHARACTERS // len(parts)
        for span in part:
            if limit > 0:
                yield span, limit
            limit -= (span.stop or 0) - span.start


def _spread(num_bytes: int) -> str:
    part = describe(MAX_CHARACTERS // NUM_PARTS)
    return f"{NUM_PARTS} parts of {part} each, spread evenly over {describe(num_bytes)}"


def _read(span: Span, limit: int) -> tuple[bytes, bool]:
    """At most so many bytes of a span, in whole lines, and whether the file goes on after them.

    A line longer than ``_LONGEST_LINE`` is cut between two characters.
    """
    size = limit if span.stop is None else min(limit, span.stop - span.start)
    with span.path.open("rb") as file:
        if span.start == 0:
            data = file.read(size)
        else:
            file.seek(span.start - 1)
            data = _from_line_start(file.read(size + 1))
        more = bool(file.read(1))
    return (_to_line_end(data) if more else data), more


def _from_line_start(data: bytes) -> bytes:
    """Without the rest of the line that the first byte belongs to."""
    end = data.find(b"\n", 0, _LONGEST_LINE)
    if end >= 0:
        return data[end + 1 :]
    start = 1
    while start < min(len(data), 4) and data[start] & 0xC0 == 0x80:
        start += 1
    return data[start:]


def _to_line_end(data: bytes) -> bytes:
    end = data.rfind(b"\n", max(len(data) - _LONGEST_LINE, 0))
    if end >= 0:
        return data[: end + 1]
    for cut in range(1, min(len(data), 4) + 1):
        if data[-cut] >= 0xC0:  # the first byte of a character
            return data[:-cut]
        if data[-cut] < 0x80:
            break
    return data


def _decode(data: bytes) -> str:
    """UTF-8 with the line ends of this system's text files, as ``Path.read_text`` gives it.

    Raises:
        UnicodeDecodeError: It is something else. Zero bytes are UTF-8, but of no text.
    """
    if (zero := data.find(b"\0")) >= 0:
        raise UnicodeDecodeError("utf-8", data, zero, zero + 1, "a zero byte")
    return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def _looks_like_text(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
