"""Checks of command-line arguments, which run before torch is imported."""

import argparse
import tempfile
from pathlib import Path


def positive(text: str) -> int:
    """Reads a whole number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def unusable_output(output: Path) -> str | None:
    """Says why a file cannot be written, before anything is computed for it; None if it can."""
    if output.is_dir():
        return f"{output}: a file expected for --output, but this is a directory"
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            return None
    except OSError as error:
        return f"{output.parent}: cannot write there: {error.strerror}"
