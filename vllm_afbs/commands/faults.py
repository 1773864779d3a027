"""What a command does about an exception that nobody expected: one line, and a traceback kept."""

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EXIT_FAULT = 70
"""BSD's EX_SOFTWARE: an error inside the program."""


def guarded(program: str, run: Callable[[], int]) -> int:
    """Runs a command; what it does not handle is said in one line on standard error.

    Args:
        program: The command's name, for the line.
        run: Returns the exit status.

    Returns:
        The exit status, ``EXIT_FAULT`` after an unexpected exception.
    """
    try:
        return run()
    except Exception as error:
        where = keep_traceback(error, "fault")
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(
            f"{program}: error: a fault of vllm-afbs, not of what you gave: {message}; please "
            f"report it; {where}",
            file=sys.stderr,
        )
        return EXIT_FAULT


def keep_traceback(error: Exception, kind: str) -> str:
    """Writes an exception's traceback to a file.

    Args:
        error: The exception.
        kind: A word for the file's name.

    Returns:
        Where the traceback is kept; if it cannot be kept, why not and which line raised.
    """
    try:
        own_version = version("vllm-afbs")
    except PackageNotFoundError:  # a checkout that is not installed
        own_version = "not installed"
    about = f"vllm-afbs {own_version}, Python {platform.python_version()}"
    text = "".join([f"{about}\n", *traceback.format_exception(error)])
    try:
        descriptor, name = tempfile.mkstemp(prefix=f"vllm-afbs-{kind}-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as refused:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"raised in {Path(last.filename).name}, line {last.lineno}; the traceback could not "
            f"be kept: {refused.strerror}"
        )
    return f"the traceback is kept in {name}"
