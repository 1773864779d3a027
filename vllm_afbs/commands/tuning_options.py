"""The tuner's options."""

import argparse
import math
import re
from pathlib import Path

from vllm_afbs.commands.arguments import add_model_options, positive

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
CPU_LONGEST = 8192
"""Longest default length without a GPU: each doubling takes four times as long."""
DEFAULT_TOLERANCE = 0.05
DEFAULT_BLOCK_Q = 128
"""Query blocks of 64 skip more, but lose more time than that at heads of 128."""


def tuning_parser(program: str) -> argparse.ArgumentParser:
    """Makes the parser of the tuner's command line.

    Args:
        program: The command's name, for its messages.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} MODEL --output FILE [option ...] [argument of vllm serve ...]",
        description="Find a model's sparse-attention thresholds and write them to a profile.",
        allow_abbrev=False,
    )
    add_model_options(parser, "a Hugging Face checkpoint: directory or hub id")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="the profile to write (JSON); a report of the same name ending in .html is written "
        "beside it",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="texts like those that will be served: UTF-8 files, folders of source files, or rows "
        "of text or chats: .jsonl and .json, and with the extra 'datasets' .parquet, .csv and "
        "directories of Hugging Face data sets; default: Python's language reference",
    )
    parser.add_argument(
        "--calibration-column",
        metavar="NAME",
        help="the column of rows that holds the text or the chat (default: text, else messages or "
        "conversations)",
    )
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        metavar="TOKENS",
        help="at least two context lengths: short ones make exploring cheap, the longest decides "
        f"(default: the three longest of {', '.join(map(str, LENGTHS))} that the model supports; "
        f"without a GPU, up to {CPU_LONGEST})",
    )
    parser.add_argument(
        "--layers",
        type=_layer_ranges,
        metavar="RANGES",
        help="tune only these layers, for instance 0-3,7; the others run dense (default: all)",
    )
    parser.add_argument(
        "--tolerance",
        type=_ratio,
        default=DEFAULT_TOLERANCE,
        help="relative L1 error allowed per head against dense attention (default: %(default)s)",
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--target-sparsity",
        type=_ratio,
        metavar="RATIO",
        help="serve, unless asked otherwise, a level that skips at least this share of the block "
        "products and changes the model's predictions as little as possible",
    )
    goal.add_argument(
        "--target-speedup",
        type=_speedup,
        metavar="RATIO",
        help="the same for attention at the longest length that is predicted to be this many times "
        "as fast as dense attention",
    )
    goal.add_argument(
        "--max-perplexity-increase",
        type=_ratio,
        metavar="RATIO",
        help="serve, unless asked otherwise, the fastest level whose perplexity grows by at most "
        "this ratio, for instance 0.01, with 95 %% confidence on windows of the texts that the "
        "search has not seen",
    )
    goal.add_argument(
        "--max-kl",
        type=_nats,
        metavar="NATS",
        help="the same for a mean KL divergence of at most so much from the dense model's "
        "predictions, measured on held-out windows, for instance 0.01",
    )
    parser.add_argument(
        "--search",
        choices=("one-tolerance", "analytic", "ax"),
        default="analytic",
        help="how levels divide the error among layers: analytic, by a law and a few runs "
        "of the model; ax, also by Bayesian optimisation around that (about 24 more runs, and "
        "texts as long as for --max-perplexity-increase), which was not shown to be better; or "
        "one-tolerance, which runs no sparse model and makes one level (default: %(default)s)",
    )
    parser.add_argument(
        "--block-q",
        type=positive,
        default=DEFAULT_BLOCK_Q,
        help="rows of a query block (default: %(default)s)",
    )
    parser.add_argument(
        "--block-k",
        type=positive,
        help="keys of a key block (default: 64 on a CPU, 128 on a GPU)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (default: 0)")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="tune N layers at once in N Ray workers on this machine; each needs the memory of one "
        "layer (extra 'ray'; default: one layer after another)",
    )
    parser.add_argument(
        "--ray-address",
        type=_ray_address,
        metavar="ADDRESS",
        help="use a running Ray cluster, 'auto' or HOST:PORT, with --workers layers at once "
        "(default: one per GPU, or one per machine without GPUs); all machines of the cluster must "
        "share the file system of the output's directory",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue a job that was stopped or killed"
    )
    return parser


def _ray_address(text: str) -> str:
    match = re.fullmatch(r"[^/\s]+:(\d{1,5})", text, re.ASCII)
    if text != "auto" and (match is None or int(match[1]) > 65535):
        raise argparse.ArgumentTypeError(f"expected auto or HOST:PORT, got {text!r}")
    return text


def _layer_ranges(text: str) -> list[range]:
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"expected layers, for instance 0-3,7, got {text!r}")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return ranges


def _nats(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0.0):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _speedup(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 1.0):
        raise argparse.ArgumentTypeError(f"expected a number above 1, got {text}")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0.0 < value < 1.0):
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value
