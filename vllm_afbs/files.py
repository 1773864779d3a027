"""Writes text files atomically, and escapes text that is printed on one line."""

import os
import tempfile
from pathlib import Path


def printable(text: str) -> str:
    """Escapes line breaks and control characters as Python does, so the text fits on one line."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file whole or not at all: a reader sees either the old text or the new one.

    Raises:
        OSError: The directory cannot be written or the disk is full. Its ``filename`` is
            ``path``, and that file is unchanged.
    """
    try:
        _replace(Path(path).resolve(), text)  # a link stays; its target is replaced
    except OSError as error:
        # Some calls name no file and others name the temporary one; the user knows only `path`.
        raise OSError(error.errno, error.strerror, str(path)) from None


def _replace(target: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
