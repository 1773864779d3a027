"""Rows of Parquet files, of which only the needed column is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_afbs.tuning.texts.data_sets import guarded
from vllm_afbs.tuning.texts.rows import Row
from vllm_afbs.tuning.texts.spread import MAX_CHARACTERS, NUM_PARTS

_ROWS_AT_ONCE = 64
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class RowGroup:
    """A group of rows, which is where a Parquet file can be entered.

    Attributes:
        path: The file.
        index: Which of its groups.
        first_row: Number of its first row in the file.
    """

    path: Path
    index: int
    first_row: int


def divide_groups(files: Sequence[Path]) -> list[list[RowGroup]]:
    """Divides the groups of files, one file after another, into parts of about equally many.

    Raises:
        InputError: The extra is not installed, or a file is damaged.
    """
    groups = []
    for path in files:
        first_row = 0
        for index, num_rows in enumerate(_group_sizes(path)):
            groups.append(RowGroup(path, index, first_row))
            first_row += num_rows
    if sum(path.stat().st_size for path in files) <= MAX_CHARACTERS:
        return [groups]
    bounds = [len(groups) * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    parts = [groups[start:stop] for start, stop in pairwise(bounds)]
    return [part for part in parts if part] or [[]]


def read_group(group: RowGroup, choose: Callable[[list[str], str], str]) -> Iterator[Row]:
    """The rows of a group, with one column.

    Args:
        group: Which.
        choose: Chooses among names of columns; is told the file, for messages.

    Raises:
        InputError: The file is damaged.
    """
    with guarded(group.path):
        file = _open(group.path)
        if not (names := file.schema_arrow.names):
            return
        column = choose(names, str(group.path))
        batches = file.iter_batches(
            batch_size=_ROWS_AT_ONCE, row_groups=[group.index], columns=[column], use_threads=False
        )
        number = group.first_row
        for batch in batches:
            for value in batch.column(0).to_pylist():
                yield Row(f"{group.path}: row {number}", {column: value})
                number += 1


def _open(path: Path) -> Any:
    import pyarrow.parquet

    # A small buffer instead of whole groups: a group may be gigabytes.
    return pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _group_sizes(path: Path) -> list[int]:
    with guarded(path):
        metadata = _open(path).metadata
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
