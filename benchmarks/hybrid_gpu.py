"""Time to first token of models in which only some layers have full attention, on an NVIDIA GPU.

    python -m benchmarks.hybrid_gpu --output results.csv

The models of ``hybrid_models`` have random weights, so that one tau for all heads sets the density
of the layers with full attention; see ``serving_gpu``. All other layers are vLLM's own.

One layer with full attention is also timed alone, dense and sparse. From that follows the share of
the whole time that such layers take, and what sparse prefill can save of it.

In qwen3.5-27b, vLLM enlarges pages until a linear layer's state fits into one: FLASH_ATTN's pages
of 128 become a multiple of 128. afbs splits its own again.
"""

import argparse
import functools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.engine import Job, run_job
from benchmarks.hybrid_models import MODELS, HybridModel
from benchmarks.profiles import uniform_profile
from benchmarks.serving_gpu import BASELINES, SPARSE_FROM, random_prompts, rows_of
from vllm_afbs.backends.cuda.card import Card
from vllm_afbs.backends.cuda.dispatch import fastest_kernel
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint

LENGTHS = (32768, 131072)
SPARSE = "afbs"
ENGINES = (*BASELINES, SPARSE)
KINDS = ("dense", "sparse")

PAGE = 128
"""Prompts are whole pages, for the layer that is timed alone."""

LayerSeconds = dict[int, dict[str, list[float]]]
"""Samples of one layer's attention by the prompt's length, dense and sparse."""


def jobs(
    model: HybridModel, folder: Path, lengths: Sequence[int], rounds: int, density: float
) -> dict[str, Job]:
    """The engines to compare, by name, in the order of ``ENGINES``."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(folder))
    longest = max(lengths)
    path = folder / "profile.json"
    calibrated = sorted({SPARSE_FROM, longest})
    profile = uniform_profile(fingerprint, density, 1 - density, calibrated)
    write_atomically(path, profile.to_json())
    prompts = list(random_prompts(lengths, model.config["vocab_size"]).values())

    def job(name: str, backend: str, **more: Any) -> Job:
        return Job(
            name, backend, str(folder), True, longest + 256, prompts, rounds,
            without_experts=model.without_experts, **more,
        )  # fmt: skip

    engines = {
        name: job(name, "FLASH_ATTN", page_size=page_size) for name, page_size in BASELINES.items()
    }
    return engines | {SPARSE: job(SPARSE, "AFBS", profile=str(path))}


def time_layer(
    model: HybridModel, lengths: Sequence[int], rounds: int, density: float
) -> LayerSeconds:
    """Times one layer with full attention; the sparse one with the kernel that a server takes."""
    from benchmarks.prefill_gpu import Case, LayerCase
    from benchmarks.timing import time_in_turns

    config = model.config
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    seconds: LayerSeconds = {}
    for length in lengths:
        shape = LayerCase(
            length, num_heads, num_kv_heads, config["head_dim"], has_sinks=model.has_sinks
        )
        case = Case(shape, structured=False)
        kernel = fastest_kernel(
            Card.of_worker(case.version).name, shape.kind, length, density,
            num_heads * case.geometry.num_scores,
        )  # fmt: skip
        sparse = case.dense
        if kernel != "dense":
            sparse = functools.partial(case.run, case.ways(density)[kernel], None)
        seconds[length] = time_in_turns({"dense": case.dense, "sparse": sparse}, rounds)
        del case, sparse
    return seconds


def model_rows(
    model: HybridModel, results: Mapping[str, dict[str, Any]], layer_seconds: LayerSeconds
) -> list[Row]:
    """What one model's engines took, and what part of it its layers with full attention take.

    Args:
        model: The model.
        results: What ``run_job`` returned, by engine.
        layer_seconds: Of one layer; empty if it was not timed.
    """
    rows = rows_of(dict(results))
    if SPARSE in results:
        num_sparse = float(results[SPARSE]["sparse_layers"])
        rows.append(make_row(f"{SPARSE}: sparse layers", "all", [num_sparse], "layers"))
    baselines = [results[name]["first_token_seconds"] for name in BASELINES if name in results]
    for length, seconds in layer_seconds.items():
        shape = str(length)
        rows += [
            make_row(f"one full layer: {kind} attention", shape, samples, "seconds")
            for kind, samples in seconds.items()
        ]
        if baselines:
            faster = min((each[shape] for each in baselines), key=median)
            dense, sparse = (model.num_full * median(seconds[kind]) for kind in KINDS)
            shares = [dense / whole for whole in faster]
            expected = [whole / (whole - dense + sparse) for whole in faster]
            what = "all full layers, dense: share of the faster FLASH_ATTN's time"
            rows.append(make_row(what, shape, shares, "ratio"))
            what = "all full layers, sparse: speedup over the faster FLASH_ATTN that follows"
            rows.append(make_row(what, shape, expected, "ratio"))
    return [replace(row, shape=f"{model.shape}, {row.shape}") for row in rows]


class Report:
    """The rows so far, and what failed; written after every step."""

    def __init__(self, output: Path | None) -> None:
        """Takes the CSV file to write, if any."""
        self._output = output
        self._rows: dict[str, list[Row]] = {}
        self.failures: list[str] = []

    def set_rows(self, model: HybridModel, rows: list[Row]) -> None:
        """Replaces a model's rows."""
        self._rows[model.name] = rows
        report_rows([row for each in self._rows.values() for row in each], self._output)

    def attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of a call; None if it fails, which must not lose what others measure."""
        try:
            return call()
        except Exception as error:  # whatever vLLM, CUDA or a kernel raises
            self.failures.append(f"{name}: {error}")
            print(f"failed: {self.failures[-1]}", file=sys.stderr, flush=True)
            return None


def _in(process: ProcessPoolExecutor, function: Callable[..., Any], *given: Any) -> Any:
    return process.submit(function, *given).result()


def run(args: argparse.Namespace, models: Sequence[HybridModel]) -> list[str]:
    """Measures; returns what failed."""
    report = Report(args.output)
    layer_seconds = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        # Its end frees the GPU for the engines.
        for model in models:
            given = (model, args.lengths, args.layer_rounds, args.density)
            call = functools.partial(_in, process, time_layer, *given)
            layer_seconds[model.name] = report.attempt(f"{model.name}, single layer", call) or {}
    for model in models:
        results: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            engines = jobs(model, Path(folder), args.lengths, args.rounds, args.density)
            for name in args.engines:
                start = functools.partial(run_job, engines[name])
                found = report.attempt(f"{model.name}, {name}", start)
                if found is not None:
                    results[name] = found
                rows = model_rows(model, results, layer_seconds[model.name])
                report.set_rows(model, rows)
    return report.failures


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; exits with 1 if an engine failed."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layer-rounds", type=int, default=5, help="of one layer's attention")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument(
        "--depth-divisor", type=int, default=1, help="makes models so many times shallower"
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    args = parser.parse_args(arguments)
    for length in args.lengths:
        if not SPARSE_FROM <= length <= LENGTHS[-1] or length % PAGE:
            parser.error(
                f"--lengths: multiples of {PAGE} from {SPARSE_FROM} to {LENGTHS[-1]} expected, "
                f"got {length}"
            )
    try:
        models = [MODELS[name].shallower(args.depth_divisor) for name in args.models]
    except ValueError as error:
        parser.error(f"--depth-divisor: {error}")
    if failures := run(args, models):
        raise SystemExit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
