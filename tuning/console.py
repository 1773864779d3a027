"""What a tuning job shows in the terminal."""

from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vllm_afbs.files import printable
from vllm_afbs.profile.adapters import describe_adapters
from vllm_afbs.profile.schema import HeadProfile, Profile
from vllm_afbs.tuning.allocation.acceptance import describe
from vllm_afbs.tuning.level_rows import level_rows


class ProgressBar:
    """One bar per stage on standard error, with the time left."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressBar":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, stage: str, total: int) -> None:
        """Starts the stage's bar."""
        self._task = self._bars.add_task(stage, total=total)

    def advance(self, units: float) -> None:
        """Moves the stage's bar."""
        if self._task is not None:
            self._bars.advance(self._task, units)


def print_summary(profile: Profile, output: Path, report: Path) -> None:
    """Prints one row per layer and per level, the totals and the paths of the results.

    The layers' rows are of the default level. Errors and sparsities are means over all heads of the
    layer; a dense head counts as 0.
    """
    # Rich would read a plain string as markup, and a name may contain anything.
    title = Text(f"{printable(profile.model_name)}, {profile.max_seq_len} tokens")
    table = Table(title=title)
    for column in ("layer", "sparse", "tau", "error", "held-out", "sparsity", "held-out"):
        table.add_column(column, justify="right")
    level = profile.level_index()
    for index in profile.full_layers:
        table.add_row(str(index), *_cells(profile.layers[index].levels[level].heads))
    table.add_section()
    table.add_row("all", *_cells(profile.heads_of(level)))
    console = Console()
    console.print(table)
    if described := describe_layers(profile):
        console.print(described, highlight=False)
    console.print(_levels(profile))
    if profile.adapters:
        held = describe_adapters(profile.adapters, [each.name for each in profile.levels])
        console.print(f"LoRA adapters: {held}", markup=False, highlight=False, soft_wrap=True)
    run = profile.tuner
    heads = profile.num_tuned_heads
    console.print(
        f"{run.evaluations} evaluations ({run.evaluations / heads:.1f} a head), "
        f"cost {run.cost:.0f} ({run.cost / heads:.2f} a head), {run.wall_seconds:.0f} s, "
        f"tolerance {run.tolerance}",
        highlight=False,
    )
    if run.budget is not None and run.budget.acceptance is not None:
        accepted = printable(describe(run.budget.acceptance))
        console.print(accepted, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{output}: profile {profile.profile_id} written; {report}: what it found",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _levels(profile: Profile) -> Table:
    """One column per level, which a terminal has room for."""
    table = Table(title="levels: sparsity and predicted speedup of attention (* is the default)")
    names, *others = zip(*(row.items() for row in level_rows(profile)), strict=True)
    table.add_column(names[0][0])
    for _, name in names:
        table.add_column(name.replace(" *", "*"), justify="right")
    for cells in others:
        table.add_row(cells[0][0], *(value.replace(", ", "\n") for _, value in cells))
    return table


def describe_layers(profile: Profile) -> str | None:
    """How many of a model's layers have full attention; None if all do."""
    num_full, num_layers = len(profile.full_layers), len(profile.layers)
    if num_full == num_layers:
        return None
    return f"{num_full} of {num_layers} layers have full attention; only those are tuned"


def _cells(heads: list[HeadProfile]) -> list[str]:
    sparse = [head for head in heads if head.tau < 1.0]
    longest = [head.calibration[-1] for head in heads if head.calibration]
    held_out = [head.validation for head in heads if head.validation is not None]
    return [
        f"{len(sparse)}/{len(heads)}",
        f"{_mean([head.tau for head in sparse]):.3f}" if sparse else "dense",
        # A layer that was not tuned has no measurements: it counts as dense.
        f"{sum(measured.error for measured in longest) / len(heads):.3f}",
        f"{sum(measured.error for measured in held_out) / len(heads):.3f}",
        f"{sum(measured.sparsity for measured in longest) / len(heads):.3f}",
        f"{sum(measured.sparsity for measured in held_out) / len(heads):.3f}",
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
