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
    rows = ",\n  ".join(json.dumps(_row(row)) for row in measurements.rows)
    return f'{{"host_seconds": {json.dumps(measurements.host_seconds)},\n "rows": [\n  {rows}]}}'


def _row(measurement: Measurement) -> dict[str, object]:
    """A row without blocks of 128, which is how all rows were written before there were others."""
    row: dict[str, object] = asdict(measurement)
    if (measurement.block_q, measurement.block_k) == (128, 128):
        del row["block_q"], row["block_k"]
    return row


def update_measurements(
    known: Measurements | None,
    host_seconds: Mapping[KernelChoice, float],
    rows: Sequence[Measurement],
) -> Measurements:
    """Replaces the host's part, and all rows of the shapes of tiles that were measured anew.

    Args:
        known: The measurements of this kind of card so far; None if there are none.
        host_seconds: What issuing a layer's prefill takes the host, by kernel.
        rows: The new rows.
    """
    tiles = {row.tile for row in rows}
    if known is None:
        return Measurements(dict(host_seconds), tuple(rows))
    kept = (row for row in known.rows if row.tile not in tiles)
    # Pages that tiles cannot use leave the host's time for tiles as it was.
    return Measurements(known.host_seconds | dict(host_seconds), (*kept, *rows))
