"""Checks of command-line arguments, which run before torch is imported."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
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


VLLM, TRANSFORMERS = "vllm", "transformers"
ENGINES = (VLLM, TRANSFORMERS)
"""What may run a model."""


def add_model_options(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Adds the options that say which model is meant, and what runs it.

    Args:
        parser: A command's parser; gets ``model``, ``revision``, ``hf_overrides`` and ``engine``.
        model_help: What the command wants as ``--model``.
    """
    parser.add_argument("--model", help=f"{model_help}; may also be the first argument, alone")
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
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="what runs the model: vllm, with any further arguments of vllm serve, or transformers "
        "in this process, for plain decoders on one device (default: vllm where it is installed)",
    )


def parse_with_engine(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line that may also hold arguments of ``vllm serve``.

    Args:
        parser: With the options of ``add_model_options``.
        arguments: The command line; None for this process's.

    Returns:
        The command's options, with ``engine`` decided, and what ``vllm serve`` would be given: the
        model and its arguments. These are for vLLM's own parser; there are none for transformers.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    leading = given.pop(0) if given and not given[0].startswith("-") else None
    options, others = parser.parse_known_args(given)
    if (leading is None) == (options.model is None):
        parser.error("one model expected: as the first argument, or as --model MODEL")
    options.model = options.model or leading
    options.engine = options.engine or (VLLM if find_spec("vllm") else TRANSFORMERS)
    if options.engine == TRANSFORMERS:
        if others:
            parser.error(
                f"unrecognized arguments: {' '.join(others)} (arguments of vllm serve, and so LoRA "
                "adapters, need --engine vllm)"
            )
        return options, []
    serve = [options.model]
    if options.revision is not None:
        serve += ["--revision", options.revision]
    if options.hf_overrides:
        serve += ["--hf-overrides", json.dumps(options.hf_overrides)]
    return options, [*serve, *others]
