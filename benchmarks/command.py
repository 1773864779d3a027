"""What the benchmarks' command lines share: arguments, the printed table and the CSV."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_afbs.commands.results import Row, write_rows


def benchmark_parser(doc: str | None) -> argparse.ArgumentParser:
    """Makes a parser that describes a benchmark by its docstring's first line and has --output."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="the CSV file to write")
    return parser


def layer_parser(
    doc: str | None, num_heads: int, num_kv_heads: int, head_dim: int
) -> argparse.ArgumentParser:
    """Makes a parser for a benchmark of one layer, with the layer's shape as default."""
    parser = benchmark_parser(doc)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each function")
    parser.add_argument("--num-heads", type=int, default=num_heads)
    parser.add_argument("--num-kv-heads", type=int, default=num_kv_heads)
    parser.add_argument("--head-dim", type=int, default=head_dim)
    return parser


def report_rows(rows: Sequence[Row], output: Path | None) -> None:
    """Prints a benchmark's figures, and writes them to ``output`` if one is given."""
    table = Table("what", "shape", "p20", "p50", "p80", "unit")
    for row in rows:
        figures = (f"{value:.6g}" for value in (row.p20, row.p50, row.p80))
        table.add_row(row.what, row.shape, *figures, row.unit)
    Console(width=140).print(table)
    if output:
        write_rows(output, rows)
