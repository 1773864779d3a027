"""Kinds of files that hold rows, by their ending."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TypeVar

from vllm_afbs.tuning.texts import data_sets, json_rows
from vllm_afbs.tuning.texts.parquet import divide_groups, read_group
from vllm_afbs.tuning.texts.plain import size_of
from vllm_afbs.tuning.texts.rows import Row
from vllm_afbs.tuning.texts.spread import Budget, divide

KINDS = ("parquet", "jsonl", "json", "csv")
"""Of several kinds in a folder, the first one here is read: data sets carry notes beside their
data."""
SAVED = "saved"
"""A folder that ``save_to_disk`` of the library ``datasets`` wrote."""
_ENDINGS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
}
_HEAD_BYTES = 1 << 12
# An array of objects, or an object that begins on its line: configuration files are indented.
_JSON_ROWS = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*\{|\{ ?")')

_Piece = TypeVar("_Piece")


@dataclass(frozen=True)
class RowPart:
    """A part of a source of rows.

    Attributes:
        rows: Its rows.
        budget: How much of them may be read; counts down as they are.
    """

    rows: Iterator[Row]
    budget: Budget


def kind_of(path: Path) -> str | None:
    """The kind of rows that a file holds by its ending; None for text."""
    name = path.name.lower()
    plain_name = name.removesuffix(".gz")
    kind = _ENDINGS.get(Path(plain_name).suffix)
    is_compressed = plain_name != name
    return None if is_compressed and kind not in ("jsonl", "json") else kind


def holds_rows(path: Path) -> bool:
    """Whether a file among others holds rows: a ``.json`` may be a configuration.

    Raises:
        OSError: It cannot be read.
    """
    if path.suffix.lower() != ".json":
        return kind_of(path) is not None
    with path.open("rb") as file:
        return _JSON_ROWS.match(file.read(_HEAD_BYTES)) is not None


def row_parts(
    kind: str, files: Sequence[Path], choose: Callable[[Iterable[str], str], str]
) -> list[RowPart]:
    """The parts that are read of files of rows.

    JSON lines and Parquet can be entered anywhere; of the other kinds there is one part, from the
    first row on.

    Args:
        kind: One of ``KINDS`` or ``SAVED``.
        files: Files of this kind, or the saved folder alone.
        choose: Chooses the column (``RowTexts.choose``) where only one is to be read.

    Raises:
        OSError: A file's size cannot be read.
        InputError: It needs an extra that is not installed.
    """
    if kind == "jsonl":
        # Where its bytes lie in the decompressed text is not known of a compressed file.
        sized = [(path, None if path.suffix.lower() == ".gz" else size_of(path)) for path in files]
        return _parts(divide(sized), json_rows.read_lines)
    if kind == "parquet":
        return _parts(divide_groups(files), lambda group, _: read_group(group, choose))
    if kind == "json":
        return _parts([files], json_rows.read_values)
    if kind == SAVED:
        return _parts([files], lambda folder, _: data_sets.read_saved(folder))
    return _parts([files], lambda path, _: data_sets.read_csv(path))


def _parts(
    parts: Sequence[Sequence[_Piece]], read: Callable[[_Piece, Budget], Iterator[Row]]
) -> list[RowPart]:
    """Each part's pieces, read one after another as they are asked for."""
    budgets = [Budget.of_one_part(len(parts)) for _ in parts]
    return [
        RowPart(chain.from_iterable(map(read, pieces, repeat(budget))), budget)
        for pieces, budget in zip(parts, budgets, strict=True)
    ]
