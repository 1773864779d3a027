"""Draws benchmarks' results.

    python -m benchmarks.plot

Reads the CSV files that ``DRAWINGS`` names, from ``benchmarks/results`` or the folder given with
``--results``, and writes an SVG beside each. Files that are missing are left out.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
_SHAPE = re.compile(r"L(?P<length>\d+)-H32/8-D128-density(?P<density>[\d.]+)$")
_COLOURS = {"tiles": "tab:blue", "triton": "tab:orange"}
_STYLES = ("-", "--", "-.", ":")
Points = list[tuple[float, float]]


Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """Reads a benchmark's rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def prefill(figure: Figure, rows: Rows) -> None:
    """Draws the speed-up over dense FlashAttention 3 by density."""
    axes = figure.add_subplot()
    curves: dict[tuple[str, int], Points] = defaultdict(list)
    for row in rows:
        way, _, what = row["what"].partition(": ")
        if (shape := _SHAPE.match(row["shape"])) and what == "speedup over dense FA3":
            point = (float(shape["density"]), float(row["p50"]))
            curves[way, int(shape["length"])].append(point)
    lengths = sorted({length for _, length in curves})
    for (way, length), points in curves.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            _STYLES[lengths.index(length)],
            color=_COLOURS[way],
            marker=".",
            label=f"{way}, {length // 1024}K",
        )
    densities = [0.05, 1.0]
    axes.plot(densities, [1 / d for d in densities], color="0.8", label="1 / density")
    axes.axhline(1.0, color="0.8", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="share of block products computed")
    axes.set(ylabel="speed-up over dense FlashAttention 3, selection included")
    axes.set_title(f"One layer's prefill, 32/8 heads, head size 128, {rows[0]['device']}")
    axes.legend(fontsize="small", ncols=2)


def serving(figure: Figure, rows: Rows) -> None:
    """Draws the time to first token by prompt length."""
    axes = figure.add_subplot()
    curves: dict[str, Points] = defaultdict(list)
    for row in rows:
        engine, _, what = row["what"].partition(": ")
        if what == "time to first token":
            curves[engine].append((float(row["shape"]), float(row["p50"])))
    for engine, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", label=engine)
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="seconds to first token")
    axes.set_title(f"vLLM, Llama-3.1-8B shapes, one {rows[0]['device']}")
    axes.legend(fontsize="small")


_SPENT, _WORTH = "evaluations a head", "sparsity at equal error"


def tuner_arms(figure: Figure, rows: Rows) -> None:
    """Draws sparsity at equal error by evaluations, for each text and group of heads."""
    panels: dict[str, dict[str, dict[str, dict[str, str]]]] = defaultdict(dict)
    for row in rows:
        name, _, what = row["what"].partition(": ")
        if what in (_SPENT, _WORTH):
            panels[row["shape"]].setdefault(name, {})[what] = row
    names = list(dict.fromkeys(name for arms in panels.values() for name in arms))
    num_texts = len({shape.split("-")[0] for shape in panels})
    figure.set_size_inches(4.5 * len(panels) / num_texts, 4 * num_texts)
    grid = figure.subplots(num_texts, len(panels) // num_texts, squeeze=False, sharey="row")
    for axes, (shape, arms) in zip(grid.flat, panels.items(), strict=True):
        for name, figures in arms.items():
            _mark(axes, name, figures[_SPENT], figures[_WORTH], names.index(name))
        axes.set(xscale="log", xlabel=_SPENT, title=shape)
        axes.title.set_fontsize("small")
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{_WORTH} on unseen text")
    fullest = max(grid.flat, key=lambda axes: len(axes.containers))
    handles, labels = fullest.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")


def _mark(axes: Axes, name: str, spent: dict[str, str], worth: dict[str, str], number: int) -> None:
    """Draws a marker at the medians over the seeds, with the spread of the sparsity."""
    low, middle, high = (float(worth[p]) for p in ("p20", "p50", "p80"))
    axes.errorbar(
        float(spent["p50"]),
        middle,
        yerr=[[middle - low], [high - middle]],
        marker="osD^vP*X<>h"[number % 11],
        color=f"C{number}" if number < 10 else "black",
        markersize=9 if name == "afbs" else 6,
        capsize=3,
        linestyle="none",
        label=name,
    )


def level_arms(figure: Figure, rows: Rows) -> None:
    """Draws each arm's gain over the analytic divisions, for the first row's longest length."""
    axes = figure.add_subplot()
    first = rows[0]["shape"]
    for row in rows:
        name, _, what = row["what"].partition(": ")
        same_length = row["shape"].rpartition("-L")[2] == first.rpartition("-L")[2]
        if same_length and what == "hypervolume over analytic":
            low, middle, high = (float(row[p]) for p in ("p20", "p50", "p80"))
            spread = [[middle - low], [high - middle]]
            axes.errorbar(middle, name, xerr=spread, marker="o", capsize=3, color="tab:blue")
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="hypervolume of (predicted time, KL) more than analytic divisions")
    axes.set_title(first)
    axes.grid(alpha=0.3)


_AT = re.compile(r"(?P<method>.+) at [\d.]+$")


def quality(figure: Figure, rows: Rows) -> None:
    """Draws the increase of perplexity by measured sparsity, for each setting."""
    panels: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        name, _, what = row["what"].partition(": ")
        panels[row["shape"]][name][what] = float(row["p50"])
    figure.set_size_inches(5 * len(panels), 5)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    numbers: dict[str, int] = {}  # a method looks the same in every panel
    for axes, (shape, found) in zip(grid, panels.items(), strict=True):
        curves: dict[str, Points] = defaultdict(list)
        for name, each in found.items():
            if at := _AT.match(name):
                increase = max(each["perplexity ratio"] - 1.0, 1e-4)  # for the log axis
                curves[at["method"]].append((each["sparsity"], increase))
        for method, points in curves.items():
            number = numbers.setdefault(method, len(numbers))
            color = "black" if method == "afbs" else f"C{number}"
            style = {"color": color, "linewidth": 2.5 if method == "afbs" else 1.5}
            axes.plot(
                *zip(*sorted(points), strict=True),
                _STYLES[number // 10 % len(_STYLES)],
                marker="osD^vP*X<>h"[number % 11],
                label=method,
                **style,
            )
        axes.set(yscale="log", xlabel="block products skipped, measured", title=shape)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("increase of perplexity over dense, ratio")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")


DRAWINGS: dict[str, Callable[[Figure, Rows], None]] = {
    "prefill_gpu": prefill,
    "serving_gpu": serving,
    "tuner_arms": tuner_arms,
    "level_arms": level_arms,
    "quality": quality,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Draws all results that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    results = parser.parse_args(argv).results
    matplotlib.rcParams["svg.hashsalt"] = "vllm-afbs"  # the same rows give the same file
    for name, draw in DRAWINGS.items():
        path = results / f"{name}.csv"
        if path.exists():
            figure = Figure(figsize=(7, 5), layout="constrained")
            draw(figure, read(path))
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
