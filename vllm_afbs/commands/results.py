"""Figures as CSV: what was measured, and the machine, versions and commit it was measured with."""

import contextlib
import csv
import functools
import io
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from vllm_afbs.files import write_atomically

CHECKOUT = Path(__file__).resolve().parents[2]
"""The checkout's root, where the package runs from one."""


@dataclass(frozen=True)
class Row:
    """One figure of a CSV.

    Attributes:
        what: What was measured.
        shape: The model, lengths and other sizes it was measured at.
        p20: 20th percentile of the samples.
        p50: Their median.
        p80: 80th percentile.
        unit: Unit of the percentiles.
        device: Name of the GPU, or of the CPU where there is none.
        versions: Versions of torch, triton and vLLM, as far as they are installed.
        commit: Commit of the checkout.
    """

    what: str
    shape: str
    p20: float
    p50: float
    p80: float
    unit: str
    device: str
    versions: str
    commit: str


def make_row(what: str, shape: str, samples: Sequence[float], unit: str) -> Row:
    """Makes a row of samples that were taken here and now."""
    p20, p50, p80 = (round(float(p), 6) for p in np.percentile(samples, (20, 50, 80)))
    return Row(what, shape, p20, p50, p80, unit, _device(), _versions(), _commit())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a CSV, one line for each row under a header of the field names.

    Raises:
        OSError: The file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def _versions() -> str:
    installed = []
    for name in ("torch", "triton", "vllm"):
        with contextlib.suppress(PackageNotFoundError):  # the tuner runs without vLLM
            installed.append(f"{name}={version(name)}")
    return " ".join(installed)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache  # asks git; every row of a run names the commit that the run began with
def _commit() -> str:
    # A copy of the tree without its history is told the commit it was made of.
    if commit := os.environ.get("VLLM_AFBS_COMMIT"):
        return commit
    # An installed package may lie inside somebody else's repository, whose commit says nothing.
    if not (CHECKOUT / ".git").exists():
        return "not a checkout"
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "not a checkout"
