"""Writes an evaluation as JSON, CSV and a picture."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_afbs.commands.results import Row, make_row, write_rows
from vllm_afbs.evaluate.comparison import PERPLEXITY, RETRIEVAL, Comparison, worst
from vllm_afbs.files import write_atomically


def rows_of(comparisons: Sequence[Comparison], shape: str) -> list[Row]:
    """Makes the CSV's rows: dense, sparse, their change, and the ends of its 95 % interval."""
    rows = []
    for each in comparisons:
        what = f"{each.test}, {each.part}"
        rows += [
            make_row(f"{what}: dense", shape, [each.dense], each.unit),
            make_row(f"{what}: sparse", shape, [each.sparse], each.unit),
            make_row(f"{what}: {change_name(each)}", shape, [each.change], change_unit(each)),
            make_row(f"{what}: low", shape, [each.low], change_unit(each)),
            make_row(f"{what}: high", shape, [each.high], change_unit(each)),
        ]
    return rows


def change_name(comparison: Comparison) -> str:
    """Says how ``Comparison.change`` is computed."""
    return "sparse / dense" if comparison.test == PERPLEXITY else "sparse - dense"


def change_unit(comparison: Comparison) -> str:
    """Unit of ``Comparison.change``."""
    return "ratio" if comparison.test == PERPLEXITY else comparison.unit


def write_report(
    output: Path, comparisons: Sequence[Comparison], about: dict[str, Any], shape: str
) -> None:
    """Writes the JSON file, and beside it files of the same name ending in .csv and .svg.

    Args:
        output: The JSON file.
        comparisons: The figures.
        about: Model, profile, text and settings of the evaluation, for the JSON file.
        shape: Model, length and sparsity in short, for the CSV and the picture's title.

    Raises:
        OSError: One of the files cannot be written.
    """
    loser = worst(comparisons)
    content = {
        **about,
        "worst_task": loser.part if loser else None,
        "results": [asdict(each) for each in comparisons],
    }
    write_atomically(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_rows(output.with_suffix(".csv"), rows_of(comparisons, shape))
    draw(output.with_suffix(".svg"), comparisons, shape)


def show(comparisons: Sequence[Comparison], sparsity: float) -> None:
    """Prints the figures, and the task that lost the most."""
    table = Table("test", "part", "dense", "sparse", "change", "95 % interval", "samples")
    for each in comparisons:
        marked = "[bold red]" if each.is_significant else ""
        table.add_row(
            each.test,
            each.part,
            f"{each.dense:.4g}",
            f"{each.sparse:.4g}",
            f"{marked}{each.change:.4f}",
            f"{each.low:.4f} to {each.high:.4f}",
            str(each.samples),
        )
    console = Console(width=140)
    console.print(table)
    console.print(f"Block products skipped: {sparsity:.1%}")
    if (loser := worst(comparisons)) is not None:
        console.print(
            f"Worst task: {loser.part}, {loser.change:+.1f} points "
            f"({loser.low:+.1f} to {loser.high:+.1f}), dense {loser.dense:.1f}"
        )


def draw(path: Path, comparisons: Sequence[Comparison], title: str) -> None:
    """Draws perplexity by position and retrieval by task, with intervals.

    Raises:
        OSError: The picture cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "vllm-afbs"  # the same figures give the same file
    panels = {test: [e for e in comparisons if e.test == test] for test in (PERPLEXITY, RETRIEVAL)}
    panels = {test: found for test, found in panels.items() if found}
    figure = Figure(figsize=(6.5 * max(1, len(panels)), 5), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for number, (test, found) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        places = range(len(found), 0, -1)
        axes.errorbar(
            [each.change for each in found],
            places,
            xerr=[
                [max(0.0, each.change - each.low) for each in found],
                [max(0.0, each.high - each.change) for each in found],
            ],
            fmt="o",
            capsize=3,
        )
        axes.axvline(1.0 if test == PERPLEXITY else 0.0, color="0.7", linewidth=0.8)
        axes.set_yticks(list(places), [each.part for each in found], fontsize="small")
        axes.set(xlabel=f"{test}: {change_name(found[0])}, with 95 % interval")
        axes.grid(alpha=0.3)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    write_atomically(path, svg.getvalue())
