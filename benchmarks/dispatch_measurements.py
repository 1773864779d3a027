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
    """A row without what goes without saying: blocks of 128, and nothing that changes times."""
    row: dict[str, object] = asdict(measurement)
    if (measurement.block_q, measurement.block_k) == (128, 128):
        del row["block_q"], row["block_k"]
    if not measurement.variant:
        del row["variant"]
    return row


def update_measurements(
    known: Measurements | None,
    host_seconds: Mapping[KernelChoice, float],
    rows: Sequence[Measurement],
) -> Measurements:
    """Replaces the host's part, and all rows of the kinds of layers that were measured anew.

    The host's part is that of plain layers, or of the first variant that was measured.

    Args:
        known: The measurements of this kind of card so far; None if there are none.
        host_seconds: What issuing a layer's prefill takes the host, by kernel.
        rows: The new rows.
    """
    if known is None:
        return Measurements(dict(host_seconds), tuple(rows))
    kinds = {row.kind for row in rows}
    kept = (row for row in known.rows if row.kind not in kinds)
    is_plain = any(not row.variant for row in rows)
    # Pages that tiles cannot use leave the host's time for tiles as it was.
    host = known.host_seconds | (dict(host_seconds) if is_plain else {})
    return Measurements(host, (*kept, *rows))
