"""Reading calibration texts: plain text, folders of source files, and rows of data sets.

``plain`` reads text, ``json_rows`` and ``data_sets`` read rows, ``rows`` and ``chats`` make text of
them, ``kinds`` and ``folders`` say what a path is, and ``spread`` what is read of a large one.
"""

import hashlib
import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_afbs.errors import InputError, one_line
from vllm_afbs.files import printable
from vllm_afbs.tuning.texts import data_sets, plain
from vllm_afbs.tuning.texts.chats import TokenizerLoader
from vllm_afbs.tuning.texts.folders import Folder, arrange
from vllm_afbs.tuning.texts.kinds import KINDS, SAVED, kind_of, row_parts
from vllm_afbs.tuning.texts.rows import COLUMN_OPTION, RowTexts
from vllm_afbs.tuning.texts.spread import describe

__all__ = ["Text", "read_texts"]

_MAX_MESSAGE = 1000


@dataclass(frozen=True)
class Text:
    """A calibration text.

    Attributes:
        name: Where it came from.
        content: All of it.
        coverage: What of the source ``content`` is: which part, column and rows, and what was
            skipped. None: the whole of a file.
    """

    name: str
    content: str
    coverage: str | None = None

    @property
    def sha256(self) -> str:
        """Hash of ``content`` in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_texts(
    paths: Sequence[Path],
    column: str | None = None,
    load_tokenizer: TokenizerLoader | None = None,
) -> list[Text]:
    """Reads every text, or without any, one that every Python has.

    Args:
        paths: Files and folders of text or of rows (``folders.arrange``).
        column: The column of rows to read; by default one of text or chats by its usual name.
        load_tokenizer: Gives the model's tokenizer, whose chat template chats go through.

    Raises:
        InputError: One of them cannot be read, or holds no text.
    """
    if not paths:
        from pydoc_data.topics import topics

        # So that two arguments are enough; real traffic is better.
        name = f"pydoc_data.topics of Python {platform.python_version()}"
        return [Text(name, plain.SEPARATOR.join(topics.values()))]
    try:
        rows = [RowTexts(column, load_tokenizer) for _ in paths]
        texts = [_read(path, its_rows) for path, its_rows in zip(paths, rows, strict=True)]
        if column is not None and not any(its_rows.num_rows for its_rows in rows):
            raise InputError(
                f"{COLUMN_OPTION}: files of rows expected, ending in {', '.join(KINDS)}; got text"
            )
        return texts
    except InputError as error:
        # Messages quote files, which may hold anything.
        raise InputError(printable(str(error)[:_MAX_MESSAGE])) from None


def _read(path: Path, rows: RowTexts) -> Text:
    try:
        path.stat()  # is_dir() would keep silent about a folder that cannot be reached
        content, coverage = _read_folder(path, rows) if path.is_dir() else _read_file(path, rows)
    except (OSError, EOFError, zlib.error) as error:
        where = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{where}: cannot read the calibration text: {reason}") from None
    if not content.strip():
        raise InputError(f"{path}: the calibration text is empty: {coverage or 'no characters'}")
    # A name may be no UTF-8, which could not be written into the profile.
    return Text(printable(str(path)), content, coverage)


def _read_file(path: Path, rows: RowTexts) -> tuple[str, str | None]:
    if (kind := kind_of(path)) is None:
        return plain.read_file(path)
    return _read_rows(kind, [path], rows)


def _read_folder(path: Path, rows: RowTexts) -> tuple[str, str]:
    if data_sets.is_saved(path):
        return _read_rows(SAVED, [path], rows)
    has_column = rows.column is not None
    folder = arrange(path, rows.column)
    if not folder.files:
        raise InputError(
            f"{path}: a data set expected: one saved by save_to_disk, or files ending in "
            f"{', '.join(KINDS)}; or a folder of text files; found none of them"
        )
    if folder.kind is None:
        return _read_sources(folder)
    try:
        content, coverage = _read_rows(folder.kind, folder.files, rows)
    except InputError as error:
        if has_column or not folder.num_others:
            raise
        hint = "most of the folder is rows, give its source files apart to have them read"
        raise InputError(f"{error}; {hint}") from None
    coverage += f"; {_count(len(folder.files), folder.kind + ' file')}"
    return content, coverage + _skipped({"hidden": folder.num_hidden, "other": folder.num_others})


def _read_sources(folder: Folder) -> tuple[str, str]:
    content, num_binary, part = plain.read_files(folder.files)
    coverage = _count(len(folder.files) - num_binary, "text file")
    coverage += f", of them {part}" if part else ""
    counts = {
        "hidden": folder.num_hidden,
        "of rows": folder.num_others,
        "that are no UTF-8 text": num_binary,
    }
    return content, coverage + _skipped(counts)


def _skipped(counts: Mapping[str, int]) -> str:
    """How many files were skipped, by why; empty if none was."""
    told = ", ".join(f"{count} {why}" for why, count in counts.items() if count)
    return f"; files skipped: {told}" if told else ""


def _read_rows(kind: str, files: Sequence[Path], rows: RowTexts) -> tuple[str, str]:
    """Rows as one text, and which rows they are."""
    parts = row_parts(kind, files, rows.choose)
    pieces = [text for part in parts for text in rows.of(part.rows, part.budget)]
    coverage = rows.summary()
    if len(parts) > 1:
        size = describe(sum(file.stat().st_size for file in files))
        coverage += f"; in {len(parts)} parts spread evenly over {size}"
    elif parts[0].budget.spent:
        coverage += "; only the first ones are read"
    return plain.SEPARATOR.join(pieces), coverage


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
