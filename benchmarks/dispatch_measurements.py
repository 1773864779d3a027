"""Writes the measurements by which ``vllm_afbs.backends.cuda.dispatch`` chooses a kernel."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from vllm_afbs.backends.cuda.dispatch import KernelChoice, Measurement, Measurements
from vllm_afbs.files import write_atomically


def write_measurements(path: Path, measurements: Mapping[str, Measurements]) -> None:
    """Writes the measurements of each kind of card as JSON, one row on each line."""
    cards = ",\n".join(f"{json.dumps(card)}: {_text(each)}" for card, each in measurements.items())
    write_atomically(path, f"{{{cards}}}\n")


def _text(measurements: Measurements) -> str:
    rows = ",\n  ".join(json.dumps(asdict(row)) for row in measurements.rows)
    return f'{{"host_seconds": {json.dumps(measurements.host_seconds)},\n "rows": [\n  {rows}]}}'


def update_measurements(
    known: Measurements | None,
    host_seconds: Mapping[KernelChoice, float],
    rows: Sequence[Measurement],
) -> Measurements:
    """Replaces the host's part, and all rows of the head sizes that were measured anew.

    Args:
        known: The measurements of this kind of card so far; None if there are none.
        host_seconds: What issuing a layer's prefill takes the host, by kernel.
        rows: The new rows.
    """
    sizes = {row.head_dim for row in rows}
    rows_so_far = () if known is None else known.rows
    kept = (row for row in rows_so_far if row.head_dim not in sizes)
    return Measurements(dict(host_seconds), (*kept, *rows))
