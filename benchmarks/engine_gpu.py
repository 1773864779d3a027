"""Times of whole commands on a real model: tuning and evaluating through vLLM's engine.

    python -m benchmarks.engine_gpu --model MODEL --output results.csv

Every row is the wall time of one command, from the start of its process to its end, vLLM's start
included. The first command on a machine compiles Python's and Triton's code, so run ``32k`` twice.
``32k-one`` makes one level and runs no sparse model. A job's log and report lie in ``--work``.
Profiles are tuned on Python's own source code and measured on its language reference.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.command import benchmark_parser, report_rows
from vllm_afbs.commands.python_reference import python_reference
from vllm_afbs.commands.results import Row, make_row

YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "max_position_embeddings": 131072,
}
"""Qwen's own recipe for 128K."""


SOURCE_CHARACTERS = 2_500_000
"""Enough for three windows of 128K tokens."""
LENGTHS_32K = ["--lengths", "8192", "16384", "32768"]


def shared(args: argparse.Namespace) -> list[str]:
    """Arguments of vLLM for all commands."""
    share = args.gpu_memory_utilization
    return [] if share is None else ["--gpu-memory-utilization", share]


def timed(module: str, arguments: Sequence[str], log: Path) -> float:
    """Seconds of ``python -m MODULE ARGUMENTS``.

    Raises:
        RuntimeError: The command failed; the log has its output.
    """
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], stdout=file, stderr=file, env=os.environ
        )
    if done.returncode:
        raise RuntimeError(f"{module}: {log.read_text(encoding='utf-8')[-2000:]}")
    return time.perf_counter() - start


def source_code(args: argparse.Namespace) -> Path:
    """Python's top-level modules in one file, in the order of their names; made once."""
    target: Path = args.work / "modules.txt"
    if not target.exists():
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = "\n".join(module.read_text(encoding="utf-8") for module in modules)
        target.write_text(text[:SOURCE_CHARACTERS], encoding="utf-8")
    return target


def language_reference(args: argparse.Namespace) -> Path:
    """Python's language reference in one file; made once."""
    target: Path = args.work / "reference.txt"
    if not target.exists():
        reference = python_reference()
        target.write_text(reference.calibration + reference.held_out, encoding="utf-8")
    return target


def evaluated(
    args: argparse.Namespace, name: str, model: Path, test: str, more: Sequence[str]
) -> list[Row]:
    """Measures the profile NAME.json, and how long that takes."""
    output = args.work / f"{name}-{test}.json"
    given = [str(model), "--profile", str(args.work / f"{name}.json"), "--output", str(output)]
    given += ["--text", str(language_reference(args)), "--tests", test, *more, *shared(args)]
    seconds = timed("vllm_afbs.evaluate", given, args.work / f"{name}-{test}.log")
    return [*_found(output, name), make_row(f"evaluate: {name}", test, [seconds], "seconds")]


def tuning_row(args: argparse.Namespace, name: str, model: Path, more: Sequence[str]) -> list[Row]:
    """Tunes a model; its profile is NAME.json."""
    output = args.work / f"{name}.json"
    given = [str(model), "--output", str(output), "--calibration", str(source_code(args)), *more]
    given += shared(args)
    seconds = timed("vllm_afbs.tune", given, args.work / f"{name}.log")
    profile = json.loads(output.read_text(encoding="utf-8"))
    lengths = f"to {profile['max_seq_len']}"
    shape = f"{model.name} {lengths}, {len(profile['layers'])} layers"
    return [make_row(f"tune: {name}", shape, [seconds], "seconds")]


def _found(output: Path, name: str) -> list[Row]:
    report = json.loads(output.read_text(encoding="utf-8"))
    shape = f"{report['length']} tokens, sparsity {report['sparsity']:.2f}"
    rows = []
    for each in report["results"]:
        what = f"{name}: {each['test']}, {each['part']}"
        rows.append(make_row(f"{what}: dense", shape, [each["dense"]], each["unit"]))
        rows.append(make_row(f"{what}: sparse", shape, [each["sparse"]], each["unit"]))
    return rows


def stretched(args: argparse.Namespace) -> Path:
    """The model with positions to 128K in its configuration; made once."""
    target: Path = args.work / f"{args.model.name}-128K"
    if not target.exists():
        target.mkdir()
        for file in args.model.iterdir():
            (target / file.name).symlink_to(file.resolve())
        config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").unlink()
        text = json.dumps(config | YARN)
        (target / "config.json").write_text(text, encoding="utf-8")
    return target


def fp8_checkpoint(args: argparse.Namespace) -> Path:
    """The model with FP8 weights, made with compressed-tensors; made once."""
    target: Path = args.work / f"{args.model.name}-FP8"
    if not target.exists():
        given = [str(args.model), str(target), "FP8_DYNAMIC"]
        timed("tests.quantised_checkpoints", given, args.work / "quantise.log")
    return target


def jobs(args: argparse.Namespace) -> Mapping[str, Sequence[Callable[[], list[Row]]]]:
    """What can be measured, by name."""
    return {
        "32k": [lambda: tuning_row(args, "32k", args.model, LENGTHS_32K)],
        "32k-one": [
            lambda: tuning_row(
                args, "32k-one", args.model, [*LENGTHS_32K, "--search", "one-tolerance"]
            )
        ],
        "retrieval": [lambda: evaluated(
                args, "32k", args.model, "retrieval", ["--per-task", str(args.per_task)]
            )],
        "128k": [
            lambda: tuning_row(
                args, "128k", stretched(args), ["--lengths", "32768", "65536", "131072"]
            )
        ],
        "fp8": [
            lambda: tuning_row(
                args, "fp8", fp8_checkpoint(args), LENGTHS_32K
            ),
            lambda: evaluated(args, "fp8", fp8_checkpoint(args), "perplexity", []),
        ],
    }  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Qwen2.5 1.5B's checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder of profiles and logs")
    parser.add_argument("--jobs", nargs="+", default=["32k", "retrieval", "128k", "fp8"])
    parser.add_argument("--per-task", type=int, default=25)
    parser.add_argument("--gpu-memory-utilization", help="of vLLM, if two jobs share a GPU")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    rows: list[Row] = []
    for name in args.jobs:
        for job in jobs(args)[name]:
            rows += job()
            report_rows(rows, args.output)


if __name__ == "__main__":
    main()
