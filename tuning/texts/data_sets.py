"""Rows that the extra ``datasets`` reads: CSV, and what ``save_to_disk`` saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from vllm_afbs.errors import InputError, one_line
from vllm_afbs.tuning.texts.rows import Row


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved(folder: Path) -> Iterator[Row]:
    """The rows of a saved data set; all of its splits, one after another.

    Raises:
        InputError: The extra is not installed, or the data set is damaged.
    """
    with guarded(folder):
        datasets = _library()
        saved = datasets.load_from_disk(folder)
        splits = saved.values() if isinstance(saved, datasets.DatasetDict) else [saved]
        yield from _located(folder, chain.from_iterable(splits))


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a CSV file, read as they are asked for.

    Raises:
        InputError: The extra is not installed, or the file is damaged.
    """
    with guarded(path):
        rows = _library().load_dataset("csv", data_files=[str(path)], split="train", streaming=True)
        yield from _located(path, rows)


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Says in one line what goes wrong in the libraries that read a data set."""
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError:
        raise InputError(
            f"{path}: reading a data set needs the extra 'datasets': "
            "pip install 'vllm-afbs[datasets]'"
        ) from None
    except Exception as error:  # Arrow, pandas and datasets raise errors of many unrelated kinds
        raise InputError(f"{path}: cannot read the data set: {one_line(error)}") from None


def _library() -> Any:
    import datasets

    datasets.disable_progress_bars()
    # It would tell the hub about every use, even of a folder.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def _located(path: Path, rows: Any) -> Iterator[Row]:
    for number, columns in enumerate(rows):
        yield Row(f"{path}: row {number}", columns)
