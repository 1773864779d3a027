"""The tuner's command line: ``python -m vllm_afbs.tune --model MODEL --output profile.json``.

Torch and Ax are imported only after the arguments have been checked, so that ``--help`` and the
message about a mistyped option appear at once.
"""

import argparse
import math
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_afbs.commands.arguments import positive, unusable_output
from vllm_afbs.commands.extras import missing_extra

if TYPE_CHECKING:
    from vllm_afbs.profile.schema import Profile
    from vllm_afbs.tuning.allocation.goal import Goal
    from vllm_afbs.tuning.model import SourceModel
    from vllm_afbs.tuning.search.scorer import SearchSettings
    from vllm_afbs.tuning.texts import Text
    from vllm_afbs.tuning.workers import LayerPool

LENGTHS = [2048, 4096, 8192, 16384, 32768]
CPU_LONGEST = 8192
"""Longest default length without a GPU: each doubling takes four times as long."""
DEFAULT_TOLERANCE = 0.05
EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: the profile is written. 2: an argument cannot be used; one line says which. 1: a file cannot
    be written, for instance because the disk is full. 130: interrupted; ``--resume`` continues.
    """
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Continue with: {_command(arguments)} --resume",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-afbs-tune",
        description="Find a model's sparse-attention thresholds and write them to a profile.",
    )
    parser.add_argument(
        "--model", required=True, help="a Hugging Face checkpoint: directory or hub id"
    )
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
        help="texts like those that will be served: UTF-8 files, or directories of Hugging Face "
        "data sets with a column 'text' (extra 'datasets'); default: Python's language reference",
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
        help="divide the error among layers so that the model skips at least this share of its "
        "block products and its predictions change as little as possible",
    )
    goal.add_argument(
        "--max-perplexity-increase",
        type=_ratio,
        metavar="RATIO",
        help="divide the error among layers so that the model skips as many block products as "
        "possible while its perplexity grows by at most this ratio, for instance 0.01, with 95 %% "
        "confidence on windows of the texts that the search has not seen",
    )
    parser.add_argument(
        "--block-q", type=positive, default=128, help="rows of a query block (default: 128)"
    )
    parser.add_argument(
        "--block-k",
        type=positive,
        default=128,
        help="keys of a key block, a multiple of the server's page size (default: 128, the size on "
        "CPUs)",
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


def _ratio(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0.0 < value < 1.0):
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _run(options: argparse.Namespace) -> int:
    if reason := missing_extra("tune") or _unusable_output(options.output):
        return _refuse(reason)
    work = Path(f"{options.output}.work")
    if work.exists() and not options.resume:
        return _refuse(
            f"{work}: left by a job that was stopped: pass --resume to continue it, or remove the "
            "directory to start again"
        )
    from vllm_afbs.tuning.model import InputError, one_line, open_model
    from vllm_afbs.tuning.texts import read_texts

    try:
        texts = read_texts(options.calibration)
        model = open_model(options.model)
        settings = _settings(options, model)
        layers = _layers(options.layers, model.fingerprint.num_layers)
        goal = _goal(options)
        with _layer_pool(options) as pool:
            profile = _tune(model, texts, settings, layers, goal, work, pool)
        from vllm_afbs.files import write_atomically
        from vllm_afbs.tuning.journal import FILE_NAME, read_entries
        from vllm_afbs.tuning.report import write_report

        write_report(profile, read_entries(work / FILE_NAME), _report_file(options.output))
        write_atomically(options.output, profile.to_json())
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        kept = f"; {work} keeps what is done, and --resume goes on with it" if work.exists() else ""
        return _refuse(f"{where}{error.strerror or one_line(error)}{kept}", EXIT_FAILED)
    shutil.rmtree(work)
    from vllm_afbs.tuning.console import print_summary

    print_summary(profile, options.output, _report_file(options.output))
    return 0


def _tune(
    model: "SourceModel",
    texts: "list[Text]",
    settings: "SearchSettings",
    layers: list[int],
    goal: "Goal | None",
    work: Path,
    pool: "LayerPool | None",
) -> "Profile":
    from vllm_afbs.tuning.console import ProgressBar
    from vllm_afbs.tuning.run import tune

    with ProgressBar() as progress:
        return tune(model, texts, settings, layers, goal, work, progress, pool)


def _goal(options: argparse.Namespace) -> "Goal | None":
    from vllm_afbs.tuning.allocation.goal import Goal
    from vllm_afbs.tuning.model import InputError

    if options.target_sparsity is not None:
        goal = Goal("sparsity", options.target_sparsity)
    elif options.max_perplexity_increase is not None:
        goal = Goal("perplexity", options.max_perplexity_increase)
    else:
        return None
    if options.layers is not None:
        raise InputError(
            "--layers: all layers expected with --target-sparsity or --max-perplexity-increase"
        )
    return goal


def _layer_pool(options: argparse.Namespace) -> "AbstractContextManager[LayerPool | None]":
    if options.workers is None and options.ray_address is None:
        return nullcontext()
    from vllm_afbs.tuning.workers import LayerPool

    return LayerPool(options.workers, options.ray_address)


def _settings(options: argparse.Namespace, model: "SourceModel") -> "SearchSettings":
    from vllm_afbs.tuning.device import compute_device
    from vllm_afbs.tuning.model import InputError
    from vllm_afbs.tuning.search.scorer import SearchSettings

    reach = model.max_length
    has_gpu = compute_device().type == "cuda"
    lengths = sorted(set(options.lengths or default_lengths(reach, has_gpu)))
    if lengths and lengths[-1] > reach:
        raise InputError(f"--lengths: at most {reach} (max_position_embeddings), got {lengths[-1]}")
    if len(lengths) < 2:
        raise InputError(
            f"--lengths: at least two different lengths up to {reach} expected, got {lengths}"
        )
    return SearchSettings(
        lengths, options.tolerance, options.block_q, options.block_k, options.seed
    )


def default_lengths(reach: int, has_gpu: bool) -> list[int]:
    """Chooses context lengths if the user gives none.

    Args:
        reach: Longest context of the model, in tokens.
        has_gpu: Whether the job runs on a GPU.
    """
    longest = reach if has_gpu else min(reach, CPU_LONGEST)
    return [length for length in LENGTHS if length <= longest][-3:]


def _layers(ranges: Sequence[range] | None, num_layers: int) -> list[int]:
    from vllm_afbs.tuning.model import InputError

    if ranges is None:
        return list(range(num_layers))
    if (last := max(each[-1] for each in ranges)) >= num_layers:
        raise InputError(f"--layers: layers from 0 to {num_layers - 1} expected, got {last}")
    return sorted({layer for each in ranges for layer in each})


def _report_file(output: Path) -> Path:
    return output.with_suffix(".html")


def _unusable_output(output: Path) -> str | None:
    if reason := unusable_output(output):
        return reason
    if output == _report_file(output):
        return f"{output}: a name ending in .json expected: .html is the report's ending"
    return None


def _refuse(message: str, status: int = EXIT_BAD_INPUT) -> int:
    print(f"vllm-afbs-tune: error: {message}", file=sys.stderr)
    return status


def _command(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["vllm-afbs-tune", *(item for item in given if item != "--resume")])


if __name__ == "__main__":
    sys.exit(main())
