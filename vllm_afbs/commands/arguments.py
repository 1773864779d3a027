"""Types of command-line arguments; imports nothing heavy, for what is refused before the rest."""

import argparse
import tempfile
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number expected, got {text}")
    return value


def unusable_output(output: Path) -> str | None:
    """Why a file cannot be written, before anything is computed for it; None if it can."""
    if output.is_dir():
        return f"{output}: a file expected for --output, this is a directory"
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            return None
    except OSError as error:
        return f"{output.parent}: cannot write there: {error.strerror}"
