"""The benchmark's rows and its table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.quality.bench import Record
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.evaluate.comparison import KL, LOSS, PERPLEXITY, RETRIEVAL, Comparison, worst

_TEXT_FIGURES = {
    (PERPLEXITY, "all positions"): "perplexity ratio",
    (LOSS, "truncated prefixes"): "next-token loss less dense",
    (KL, "truncated prefixes"): "next-token KL to dense",
    (RETRIEVAL, "all kinds"): "retrieval less dense",
}


def rows_of(records: Sequence[Record], length: int) -> list[Row]:
    """Makes the rows of all measurements."""
    rows = []
    for record in records:
        shape = f"{record['setting']}-L{length}"

        def add(
            what: str, value: float, unit: str, record: Record = record, at: str = shape
        ) -> None:
            rows.append(make_row(f"{record['method']}: {what}", at, [value], unit))

        add("sparsity", record["sparsity"], "ratio")
        comparisons = [Comparison(**each) for each in record["results"]]
        for each in comparisons:
            if what := _TEXT_FIGURES.get((each.test, each.part)):
                unit = "ratio" if each.test == PERPLEXITY else each.unit
                for name, value in (("", each.change), (", low", each.low), (", high", each.high)):
                    add(f"{what}{name}", value, unit)
        if (loser := worst(comparisons)) is not None:
            add(f"worst task, {loser.part}", loser.change, loser.unit)
    return rows


def show(records: Sequence[Record]) -> None:
    """Prints perplexity ratios, KL divergences and retrieval."""
    table = Table("text", "method", "sparsity", "perplexity", "95 %", "KL", "retrieval")
    for record in records:
        found = {(e["test"], e["part"]): e for e in record["results"]}
        ratio, kl = found[PERPLEXITY, "all positions"], found[KL, "truncated prefixes"]
        points = found.get((RETRIEVAL, "all kinds"))
        table.add_row(
            record["setting"],
            record["method"],
            f"{record['sparsity']:.3f}",
            f"{ratio['change']:.4f}",
            f"{ratio['low']:.4f} to {ratio['high']:.4f}",
            f"{kl['change']:.4f}",
            f"{points['change']:+.1f}" if points else "",
        )
    Console(width=140).print(table)
