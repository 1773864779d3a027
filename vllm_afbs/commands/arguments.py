"""Checks of command-line arguments, which run before torch is imported."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """Reads a whole number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, as ``vllm serve`` takes it for several options."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"a JSON object expected: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object expected, got {text:.100}")
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
