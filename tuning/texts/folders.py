"""What a folder is: files of rows, or source files that are text."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_afbs.tuning.texts.kinds import KINDS, holds_rows, kind_of

# They describe what lies beside them.
_NOTES = re.compile(r"(README|LICENSE)(\..*)?|dataset_infos\.json", re.IGNORECASE)


@dataclass(frozen=True)
class Folder:
    """What is to be read of a folder.

    Attributes:
        kind: The kind of rows that its files hold (``kinds.KINDS``); None for text.
        files: Those to be read, in their order.
        num_hidden: Entries left out because their name begins with a dot.
        num_others: Files left out because they hold something else than the rest.
    """

    kind: str | None
    files: list[Path]
    num_hidden: int
    num_others: int


def arrange(path: Path, column: str | None) -> Folder:
    """Tells a data set from a folder of source files.

    It is a data set if its files of rows are no smaller than all others together, or if the user
    names a column.

    Args:
        path: The folder.
        column: The column that the user names, or None.

    Raises:
        OSError: The folder or a file in it cannot be read.
    """
    files, num_hidden = _walk(path)
    rows: list[Path] = []
    others: list[Path] = []
    for file in files:
        (rows if holds_rows(file) else others).append(file)
    if rows and (
        column is not None or _num_bytes(rows) >= _num_bytes(_without_notes(path, others))
    ):
        kinds = [kind_of(file) for file in rows]
        kind = next(kind for kind in KINDS if kind in kinds)
        chosen = [file for file, its_kind in zip(rows, kinds, strict=True) if its_kind == kind]
        return Folder(kind, chosen, num_hidden, len(files) - len(chosen))
    return Folder(None, others, num_hidden, len(rows))


def _walk(folder: Path) -> tuple[list[Path], int]:
    """A folder's files at any depth, ordered by name, and how many hidden entries it has.

    Links to folders are not followed: they can lead in circles.
    """

    def refuse(error: OSError) -> None:
        raise error

    files, num_hidden = [], 0
    for parent, folders, names in os.walk(folder, onerror=refuse):
        num_hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (Path(parent, name) for name in names if not name.startswith("."))
        # Pipes and devices are left out, too: reading one may never end.
        files += [path for path in visible if path.is_file()]
    return sorted(files, key=str), num_hidden


def _without_notes(folder: Path, files: list[Path]) -> list[Path]:
    return [file for file in files if file.parent != folder or not _NOTES.fullmatch(file.name)]


def _num_bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
