"""The argument ``--texts``: kinds of text that a benchmark is run on."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_afbs.demo.assets import Assets

PYTHON = "python"
"""The demo's text."""


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        name: Name of the kind.
        calibration: The text that methods are tuned on.
        measured: The text that they are measured on, which no method has seen.
    """

    name: str
    calibration: Path
    measured: Path


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Adds ``--texts``."""
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[PYTHON],
        metavar="TEXT",
        help=f"{PYTHON!r} for the demo's text, or NAME=CALIBRATION,MEASURED with two files",
    )


def read_domains(texts: Sequence[str], assets: Assets) -> list[Domain]:
    """Reads the values of ``--texts``.

    Raises:
        SystemExit: A value is malformed; the message names it.
    """
    demo = Domain(PYTHON, assets.calibration_file, assets.prompt_file)
    return [demo if text == PYTHON else _domain(text) for text in texts]


def _domain(text: str) -> Domain:
    name, _, files = text.partition("=")
    calibration, _, measured = files.partition(",")
    if not (name and calibration and measured):
        raise SystemExit(f"--texts: NAME=CALIBRATION,MEASURED expected, got {text}")
    return Domain(name, Path(calibration), Path(measured))
