"""Time to first token of models in which only some layers have full attention, on an NVIDIA GPU.

    python -m benchmarks.hybrid_gpu --output results.csv

The models of ``hybrid_models`` have random weights, so that one tau for all heads sets the density
of the layers with full attention; see ``serving_gpu``. All other layers are vLLM's own. What share
of the time those layers take is worked out from one such layer's dense attention, timed alone.
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
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint

LENGTHS = (32768, 131072)
SPARSE = "afbs"
ENGINES = (*BASELINES, SPARSE)

PAGE = 128
"""Prompts are whole pages, for the layer that is timed alone."""

LayerSeconds = dict[int, list[float]]
"""Samples of one layer's dense attention, by the prompt's length."""


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


def time_dense_layers(
    models: Sequence[HybridModel], lengths: Sequence[int], rounds: int
) -> dict[str, LayerSeconds]:
    """Times dense attention of one layer with full attention, by the model's name."""
    from benchmarks.prefill_gpu import Case
    from benchmarks.timing import time_in_turns

    seconds: dict[str, LayerSeconds] = {}
    for model in models:
        config = model.config
        num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        for length in lengths:
            case = Case(length, num_heads, num_kv_heads, config["head_dim"], structured=False)
            found = time_in_turns({"dense": case.dense}, rounds)["dense"]
            seconds.setdefault(model.name, {})[length] = found
            del case
    return seconds


def model_rows(
    model: HybridModel, results: Mapping[str, dict[str, Any]], layer_seconds: LayerSeconds
) -> list[Row]:
    """What one model's engines took, and the share of its layers with full attention.

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
    for length, samples in layer_seconds.items():
        shape = str(length)
        rows.append(make_row("dense attention of one full layer", shape, samples, "seconds"))
        if baselines:
            faster = min((each[shape] for each in baselines), key=median)
            shares = [model.num_full * median(samples) / whole for whole in faster]
            what = "dense attention of all full layers: share of the faster FLASH_ATTN's time"
            rows.append(make_row(what, shape, shares, "ratio"))
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


def run(args: argparse.Namespace, models: Sequence[HybridModel]) -> list[str]:
    """Measures; returns what failed."""
    report = Report(args.output)
    spawn = multiprocessing.get_context("spawn")

    def time_layers() -> dict[str, LayerSeconds]:
        with ProcessPoolExecutor(1, spawn) as process:  # its end frees the GPU
            pending = process.submit(time_dense_layers, models, args.lengths, args.layer_rounds)
            return pending.result()

    layer_seconds = report.attempt("dense layers", time_layers) or {}
    for model in models:
        results: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            engines = jobs(model, Path(folder), args.lengths, args.rounds, args.density)
            for name in args.engines:
                start = functools.partial(run_job, engines[name])
                found = report.attempt(f"{model.name}, {name}", start)
                if found is not None:
                    results[name] = found
                rows = model_rows(model, results, layer_seconds.get(model.name, {}))
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
