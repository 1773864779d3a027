"""Kinds of text that a benchmark is run on, as its command line names them."""

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
        name: Of the kind.
        calibration: What arms see.
        measured: What none sees.
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
        help=f"{PYTHON!r} for the demo's, or NAME=CALIBRATION,MEASURED: two files",
    )


def read_domains(texts: Sequence[str], assets: Assets) -> list[Domain]:
    """What ``--texts`` names.

    Raises:
        SystemExit: One of them is malformed; the message says which.
    """
    demo = Domain(PYTHON, assets.calibration_file, assets.prompt_file)
    return [demo if text == PYTHON else _domain(text) for text in texts]


def _domain(text: str) -> Domain:
    name, _, files = text.partition("=")
    calibration, _, measured = files.partition(",")
    if not (name and calibration and measured):
        raise SystemExit(f"--texts: {text}: NAME=CALIBRATION,MEASURED expected")
    return Domain(name, Path(calibration), Path(measured))
