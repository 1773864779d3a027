"""Reading calibration texts: UTF-8 files and Hugging Face data sets on disk."""

import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_afbs.tuning.model import InputError, one_line

COLUMN = "text"
"""Column of a data set that is read."""
MAX_CHARACTERS = 1 << 24
"""Rows of a data set are read until they hold so many: several windows of a million tokens."""
_SEPARATOR = "\n\n"
# The first kind found in a folder counts: data sets carry notes beside their data.
_BUILDERS = {"parquet": "parquet", "jsonl": "json", "json": "json", "csv": "csv", "txt": "text"}


@dataclass(frozen=True)
class Text:
    """A calibration text.

    Attributes:
        name: Where it came from.
        content: All of it.
    """

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """Reads every text, or without any, one that every Python has.

    Args:
        paths: UTF-8 files and directories of data sets.

    Raises:
        InputError: One of them cannot be read, or holds no text.
    """
    if not paths:
        from pydoc_data.topics import topics

        # So that two arguments are enough; real traffic is better.
        name = f"pydoc_data.topics of Python {platform.python_version()}"
        return [Text(name, _SEPARATOR.join(topics.values()))]
    return [_read_dataset(path) if path.is_dir() else _read_file(path) for path in paths]


def _read_file(path: Path) -> Text:
    try:
        return Text(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "UTF-8 text expected"
        raise InputError(f"{path}: cannot read the calibration text: {reason}") from None


def _read_dataset(path: Path) -> Text:
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: a file expected: reading a data set needs the extra 'datasets': "
            "pip install 'vllm-afbs[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    # It would tell the hub about every use, even of a folder.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return Text(str(path), _SEPARATOR.join(_texts(path, _rows(path))))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{path}: cannot read the data set: {one_line(error)}") from None


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    """The rows of a data set, read as they are asked for; all of its splits, one after another."""
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(path)
        splits = saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]
        return (row for split in splits for row in split)
    for ending, builder in _BUILDERS.items():
        if files := sorted(map(str, path.rglob(f"*.{ending}"))):
            # A whole file is one text: its lines belong together.
            options = {"sample_by": "document"} if builder == "text" else {}
            # The folder's own name would have its README read, which may point to other machines.
            rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, **options
            )
            return rows
    raise InputError(
        f"{path}: a data set expected: one saved by save_to_disk, or files ending in "
        f"{', '.join(_BUILDERS)}"
    )


def _texts(path: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    characters = 0
    for number, row in enumerate(rows):
        if COLUMN not in row:
            raise InputError(f"{path}: a column {COLUMN!r} expected, found {', '.join(row)}")
        text = row[COLUMN]
        if not isinstance(text, str):
            raise InputError(
                f"{path}: row {number}: {COLUMN}: text expected, got {type(text).__name__}"
            )
        yield text
        characters += len(text)
        if characters >= MAX_CHARACTERS:
            return
