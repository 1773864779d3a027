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


def add_model_options(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Adds the options that say which model is meant.

    Args:
        parser: A command's parser; gets ``model``, ``revision`` and ``hf_overrides``.
        model_help: What the command wants as ``--model``.
    """
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument(
        "--revision", help="branch, tag or commit of a model on the hub (default: its main branch)"
    )
    parser.add_argument(
        "--hf-overrides",
        type=json_object,
        default={},
        metavar="JSON",
        help="fields of config.json to set, as given to vllm serve: longer positions, for instance",
    )
