"""Writes the measurements by which ``vllm_afbs.backends.cuda.dispatch`` chooses a kernel."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from vllm_afbs.backends.cuda.dispatch import KernelChoice, Measurement, Measurements
from vllm_afbs.files import write_atomically


def write_measurements(path: Path, measurements: Measurements) -> None:
    """Writes measurements as JSON, one row on each line."""
    rows = ",\n  ".join(json.dumps(asdict(row)) for row in measurements.rows)
    host_seconds = json.dumps(measurements.host_seconds)
    write_atomically(path, f'{{"host_seconds": {host_seconds},\n "rows": [\n  {rows}]}}\n')


def update_measurements(
    known: Measurements,
    host_seconds: Mapping[KernelChoice, float],
    rows: Sequence[Measurement],
) -> Measurements:
    """Replaces the host's part, and all rows of the head sizes that were measured anew.

    Args:
        known: The measurements so far.
        host_seconds: What issuing a layer's prefill takes the host, by kernel.
        rows: The new rows.
    """
    sizes = {row.head_dim for row in rows}
    kept = (row for row in known.rows if row.head_dim not in sizes)
    return Measurements(dict(host_seconds), (*kept, *rows))
