"""The benchmark's command line."""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from benchmarks import level_arms
from benchmarks.command import benchmark_parser
from benchmarks.domains import add_texts, read_domains
from benchmarks.level_arms.arms import ARMS, SLOW
from benchmarks.level_arms.samples import Figures, Plan, sample
from vllm_afbs.commands.arguments import ENGINES, TRANSFORMERS
from vllm_afbs.commands.results import Row, make_row, write_rows
from vllm_afbs.demo.assets import prepare
from vllm_afbs.tuning.allocation.student import t_quantile

UNITS = {
    "hypervolume": "ratio",
    "sparsity at equal KL": "ratio",
    "time at equal KL": "ratio",
    "model runs": "count",
    "seconds": "seconds",
    "seconds in the optimiser": "seconds",
    "share of winners that the model proposed": "ratio",
}
GAINS = {
    "hypervolume over analytic": ("hypervolume", "analytic"),
    "sparsity over theta trials": ("sparsity at equal KL", "theta trials"),
    "time over theta trials": ("time at equal KL", "theta trials"),
}
"""Differences of a figure from that of another arm in the same sample."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the arms on the demo's model."""
    args = _parser().parse_args(argv)
    assets = prepare()
    plan = Plan(
        str(args.model or assets.model_dir),
        args.engine,
        sorted(args.lengths),
        args.tolerance,
        args.cost,
        args.unseen,
        max(args.seeds) + 1,
    )
    names = ["one tolerance", *(name for name in args.arms if name != "one tolerance")]
    taken: list[dict[str, Figures]] = []
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for seed in args.seeds:
            for domain in read_domains(args.texts, assets):
                taken.append(sample(plan, domain, seed, names, work))
                rows = rows_of(taken, f"{len(taken)} samples-L{plan.lengths[-1]}")
                if args.output:
                    write_rows(args.output, rows)
    print_summary(taken)


def rows_of(taken: Sequence[dict[str, Figures]], shape: str) -> list[Row]:
    """The figures of every arm over its samples, and its gain over the analytic divisions."""
    rows = []
    for name in taken[0]:
        for figure, unit in UNITS.items():
            values = [each[name][figure] for each in taken if figure in each[name]]
            if values:
                rows.append(make_row(f"{name}: {figure}", shape, values, unit))
        for gain in GAINS:
            if gains := gains_of(taken, name, gain):
                rows.append(make_row(f"{name}: {gain}", shape, gains, "ratio"))
    return rows


def gains_of(taken: Sequence[dict[str, Figures]], name: str, gain: str) -> list[float]:
    """An arm's figure less that of the arm it is compared with, by sample."""
    figure, other = GAINS[gain]
    return [
        each[name][figure] - each[other][figure]
        for each in taken
        if name != other and figure in each[name] and figure in each.get(other, {})
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of samples, and half of its 95 % interval by Student; infinite for one sample."""
    if len(values) < 2:
        return fmean(values), float("inf")
    return fmean(values), t_quantile(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5


def print_summary(taken: Sequence[dict[str, Figures]]) -> None:
    """Prints one line for each arm."""
    table = Table()
    for column in ("arm", *UNITS, *(f"{gain}, 95 %" for gain in GAINS)):
        table.add_column(column)
    for name in taken[0]:
        cells = []
        for figure in UNITS:
            values = [each[name][figure] for each in taken if figure in each[name]]
            cells.append(f"{fmean(values):.3f}" if values else "")
        for gain in GAINS:
            gains = gains_of(taken, name, gain)
            cells.append("{:+.4f} ± {:.4f}".format(*interval(gains)) if gains else "")
        table.add_row(name, *cells)
    Console(width=240).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(level_arms.__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint (default: the demo's)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--engine", choices=ENGINES, default=TRANSFORMERS, help="runs the model")
    parser.add_argument(
        "--cost", choices=["cpu", "here"], default="here", help="whose time is predicted"
    )
    parser.add_argument("--unseen", type=int, default=3, help="windows that no arm has seen")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add_texts(parser)
    quick = [name for name in ARMS if name not in SLOW]
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=quick, metavar="ARM")
    parser.add_argument(
        "--work", type=Path, help="folder for finished steps, which another run goes on from"
    )
    return parser


if __name__ == "__main__":
    main()
