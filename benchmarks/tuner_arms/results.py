"""From samples to a CSV's rows, and a summary of them."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.tuner_arms.samples import GroupFigures
from benchmarks.tuner_arms.times import Times
from vllm_afbs.commands.results import Row, make_row

UNITS = {
    "evaluations a head": "count",
    "evaluations a head without validation": "count",
    "cost a head": "full evaluations",
    "mean sparsity on calibration text": "ratio",
    "mean error on unseen text": "relative L1",
    "mean sparsity on unseen text": "ratio",
    "sparsity at equal error": "ratio",
    "error there": "relative L1",
}
"""Of each figure of a sample."""
_COLUMNS = {
    "evaluations a head": "evaluations",
    "evaluations a head without validation": "of them search",
    "cost a head": "cost",
    "mean sparsity on calibration text": "calibration sparsity",
    "mean error on unseen text": "error",
    "mean sparsity on unseen text": "sparsity",
    "sparsity at equal error": "at equal error",
}
Samples = Sequence[Mapping[str, GroupFigures]]
"""For each seed, each arm's figures."""


def sample_rows(domain: str, samples: Samples, names: Sequence[str], setting: str) -> list[Row]:
    """Rows of one text: each figure's spread over the seeds.

    Args:
        domain: The text's name.
        samples: Of each seed.
        names: The arms.
        setting: The length and the tolerance, for the rows' shape.
    """
    rows = []
    for name in names:
        for group in samples[0][name]:
            each = [sample[name][group] for sample in samples]
            rows += [
                make_row(
                    f"{name}: {what}",
                    f"{domain}-{group}-{setting}",
                    [figures[what] for figures in each],
                    unit,
                )
                for what, unit in UNITS.items()
            ]
    return rows


def time_rows(times: Mapping[str, Times], ways: Iterable[str], shape: str) -> list[Row]:
    """Rows of the times, in each way: their spread over the layers."""
    return [
        make_row(f"{name}: {way}", shape, record[way], "seconds")
        for name, record in times.items()
        for way in ways
    ]


def print_summary(rows: Sequence[Row]) -> None:
    """Prints a table for each shape: medians, and the sparsities' spread."""
    by_shape: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        name, _, what = row.what.partition(": ")
        by_shape.setdefault(row.shape, {}).setdefault(name, {})[what] = row
    console = Console(width=140)
    for shape, arms in by_shape.items():
        first = next(iter(arms.values()))
        known = {what: _COLUMNS.get(what, what) for what in first if what != "error there"}
        table = Table("arm", *known.values(), title=shape)
        for name, figures in arms.items():
            table.add_row(name, *(_cell(figures[what]) for what in known))
        console.print(table)


def _cell(row: Row) -> str:
    if row.p20 == row.p80:
        return f"{row.p50:.4g}"
    return f"{row.p50:.4g} [{row.p20:.4g}, {row.p80:.4g}]"
