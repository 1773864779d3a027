"""Timing in turns, and the CSV that every benchmark writes."""

import argparse
import contextlib
import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's CSV."""

    what: str
    shape: str
    p20: float
    p50: float
    p80: float
    unit: str
    device: str
    versions: str
    commit: str


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Times functions one after another, round by round, so that drift hits all alike.

    On a GPU the time is the device's, between two events, from a cleared cache. The host gets a
    millisecond's lead, as a model's matrix products give it, so that what is timed is the work and
    not how fast Python can launch it.

    Args:
        functions: What to time, by name; each is called once before the first round.
        rounds: Timed calls of each.

    Returns:
        Seconds of every timed call, by name.
    """
    time_call = _device_seconds if torch.cuda.is_available() else _host_seconds
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(time_call(function))
    return seconds


def _host_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


_LEAD_CYCLES = 2_000_000


def _device_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    torch.cuda._sleep(_LEAD_CYCLES)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def make_row(what: str, shape: str, samples: Sequence[float], unit: str) -> Row:
    """Summarises samples with the machine, versions and commit they were taken with."""
    p20, p50, p80 = (round(float(p), 6) for p in np.percentile(samples, (20, 50, 80)))
    return Row(what, shape, p20, p50, p80, unit, _device(), _versions(), _commit())


def ratio_row(what: str, shape: str, baseline: Sequence[float], own: Sequence[float]) -> Row:
    """How many times faster than the baseline, round by round."""
    ratios = [slow / fast for slow, fast in zip(baseline, own, strict=True)]
    return make_row(what, shape, ratios, "ratio")


def benchmark_parser(doc: str | None) -> argparse.ArgumentParser:
    """A benchmark's arguments, described by its module's first line; all can write a CSV."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="CSV to write")
    return parser


def layer_parser(
    doc: str | None, num_heads: int, num_kv_heads: int, head_dim: int
) -> argparse.ArgumentParser:
    """Arguments of a benchmark of one layer, with that layer's shape as default."""
    parser = benchmark_parser(doc)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-heads", type=int, default=num_heads)
    parser.add_argument("--num-kv-heads", type=int, default=num_kv_heads)
    parser.add_argument("--head-dim", type=int, default=head_dim)
    return parser


def report_rows(rows: Sequence[Row], output: Path | None) -> None:
    """Prints a benchmark's figures and writes them where asked to."""
    show_rows(rows)
    if output:
        write_rows(output, rows)


def show_rows(rows: Sequence[Row]) -> None:
    """Prints a benchmark's figures."""
    table = Table("what", "shape", "p20", "p50", "p80", "unit")
    for row in rows:
        figures = (f"{value:.6g}" for value in (row.p20, row.p50, row.p80))
        table.add_row(row.what, row.shape, *figures, row.unit)
    Console(width=140).print(table)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a benchmark's CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


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


def _commit() -> str:
    # A copy of the tree without its history is told the commit it was made of.
    if commit := os.environ.get("VLLM_AFBS_COMMIT"):
        return commit
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "not a checkout"
