"""Draws the GPU benchmarks' results.

    python -m vllm_afbs.benchmarks.plot

Reads ``prefill_gpu.csv`` and ``serving_gpu.csv`` in ``benchmarks/results`` and writes
``prefill_gpu.svg`` and ``serving_gpu.svg`` beside them.
"""

import csv
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
_SHAPE = re.compile(r"L(?P<length>\d+)-H32/8-D128-density(?P<density>[\d.]+)$")
_COLOURS = {"tiles": "tab:blue", "triton": "tab:orange"}
_STYLES = ("-", "--", "-.", ":")
Points = list[tuple[float, float]]


def read(name: str) -> list[dict[str, str]]:
    """A benchmark's rows."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def prefill(axes: Axes) -> None:
    """Speed-up over dense FlashAttention 3 by density."""
    curves: dict[tuple[str, int], Points] = defaultdict(list)
    for row in read("prefill_gpu.csv"):
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
    axes.set_title("One layer's prefill, 32/8 heads, head size 128, H100")
    axes.legend(fontsize="small", ncols=2)


def serving(axes: Axes) -> None:
    """Time to first token by prompt length."""
    curves: dict[str, Points] = defaultdict(list)
    for row in read("serving_gpu.csv"):
        engine, _, what = row["what"].partition(": ")
        if what == "time to first token":
            curves[engine].append((float(row["shape"]), float(row["p50"])))
    for engine, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", label=engine)
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="seconds to first token")
    axes.set_title("vLLM 0.26.0, Llama-3.1-8B shapes, one H100")
    axes.legend(fontsize="small")


def main() -> None:
    """Draws both."""
    matplotlib.rcParams["svg.hashsalt"] = "vllm-afbs"  # the same rows give the same file
    for name, draw in (("prefill_gpu", prefill), ("serving_gpu", serving)):
        figure = Figure(figsize=(7, 5), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
