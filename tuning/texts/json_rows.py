"""Rows of JSON files: lines (``.jsonl``) and arrays (``.json``), compressed with gzip or not."""

import codecs
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts.rows import Row
from vllm_afbs.tuning.texts.spread import BYTES_PER_ROW, MAX_ROW_BYTES, Budget, Span, describe

_CHUNK_BYTES = 1 << 20
_BYTE_ORDER_MARK = codecs.BOM_UTF8
_WHITESPACE = re.compile(r"[ \t\r\n]*")


def read_lines(span: Span, budget: Budget) -> Iterator[Row]:
    """The rows whose lines begin inside a span: one JSON object a line; blank lines are none.

    Raises:
        OSError, EOFError, zlib.error: The file cannot be read or decompressed.
        InputError: A line is no JSON, or too long.
    """
    with _open(span.path) as file:
        position, number = span.start, 1
        if span.start:
            # The line that begins before the span is another part's.
            file.seek(span.start - 1)
            position += len(_line(file, span.path, f"byte {span.start}")) - 1
        while (span.stop is None or position < span.stop) and not budget.spent:
            where = f"byte {position}" if span.start else f"line {number}"
            line = _line(file, span.path, where)
            if not line:
                return
            if position == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            position += len(line)
            number += 1
            budget.num_bytes -= len(line)
            if line.isspace():
                budget.num_bytes -= BYTES_PER_ROW
            else:
                where = f"{span.path}: {where}"
                yield Row(where, _parse(line, where))


def read_values(path: Path, budget: Budget) -> Iterator[Row]:
    """The rows of a JSON array, or of JSON objects one after another.

    Raises:
        OSError, EOFError, zlib.error: The file cannot be read or decompressed.
        InputError: It is no JSON, or a row is too long.
    """
    with _open(path) as file:
        values = _Values(file, path, budget)
        if values.peek() != "[":
            while values.peek():
                yield values.row()
            return
        values.take("[")
        if values.peek() != "]":
            yield values.row()
            while values.peek() == ",":
                values.take(",")
                yield values.row()
        values.take("]")
        values.take("")


class _Values:
    """JSON values of a file, of which no more is held than one value and a chunk."""

    def __init__(self, file: IO[bytes], path: Path, budget: Budget) -> None:
        self._file = file
        self._path = path
        self._budget = budget
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._held = ""
        self._at = 0
        self._line = 1

    def peek(self) -> str:
        """The next letter that is no white space; empty at the end."""
        while True:
            end = _WHITESPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            self._line += self._held.count("\n", self._at, end)
            self._at = end
            if self._at < len(self._held):
                return self._held[self._at]
            if self._budget.spent or not self._fill(_CHUNK_BYTES):
                return ""

    def take(self, expected: str) -> None:
        """Passes over that letter, or the end if it is empty.

        Raises:
            InputError: Something else is there.
        """
        if (found := self.peek()) != expected:
            end = "the end of the file"
            raise InputError(
                f"{self._where()}: {expected or end} expected after a row, found {found or end}"
            )
        self._at += len(expected)

    def row(self) -> Row:
        """The value that comes next.

        Raises:
            InputError: It is no JSON, or too long.
        """
        self.peek()
        where = self._where()
        while True:
            try:
                value, end = self._json.raw_decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                # Perhaps only its beginning is held. Doubling bounds how often it is read again.
                rest = len(self._held) - self._at
                if rest > MAX_ROW_BYTES:
                    raise _too_long(where) from None
                if isinstance(error, RecursionError) or not self._fill(max(rest, _CHUNK_BYTES)):
                    raise _no_json(where, error) from None
                continue
            self._line += self._held.count("\n", self._at, end)
            self._at = end
            return Row(where, value)

    def _where(self) -> str:
        return f"{self._path}: line {self._line}"

    def _fill(self, num_bytes: int) -> bool:
        """Reads on, and forgets what was passed; whether there was more."""
        data = self._file.read(num_bytes)
        self._budget.num_bytes -= len(data)
        try:
            more = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError:
            raise InputError(f"{self._where()}: UTF-8 text expected after here") from None
        self._held = self._held[self._at :] + more
        self._at = 0
        return bool(data)


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def _line(file: IO[bytes], path: Path, where: str) -> bytes:
    line = file.readline(MAX_ROW_BYTES + 1)
    if len(line) > MAX_ROW_BYTES:
        raise _too_long(f"{path}: {where}")
    return line


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: UTF-8 text expected") from None
    except (ValueError, RecursionError) as error:
        raise _no_json(where, error) from None


def _no_json(where: str, error: Exception) -> InputError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    reason = reason.removesuffix(" starting at")
    return InputError(f"{where}: a JSON object expected: {reason}")


def _too_long(where: str) -> InputError:
    return InputError(f"{where}: a row of at most {describe(MAX_ROW_BYTES)} expected")
