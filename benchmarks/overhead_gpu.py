"""What afbs costs without a profile, and what its metrics cost with one, on an NVIDIA GPU.

    python -m benchmarks.overhead_gpu --output results.csv

Two engines with Llama-3.1-8B's shapes and random weights run one after the other:

- *without a profile*: short prompts and decodes. Between calls, afbs's layers and metadata builders
  are turned into FlashAttention's own and back.
- *sparse*: long prompts with one tau for all heads. Between calls, the code that reports a layer's
  work is taken out and put back. The selector's counters stay, because its kernel contains them.

Both sides are thus timed in one process on one cache. Two processes would differ by more than a
percent by themselves.
"""

import functools
import json
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.engine import ENVIRONMENT, Engine, Job
from benchmarks.profiles import uniform_profile
from benchmarks.serving_gpu import DECODES, LLAMA_8B, SHORT, SPARSE_FROM
from benchmarks.timing import ratio_row
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.serving.settings import PROFILE_VARIABLE

TAU = 0.2
SPARSE = (SPARSE_FROM, 32768)
Without = Callable[[], AbstractContextManager[object]]
"""Makes a context without the code whose cost is measured."""


def swappable(worker: Any) -> list[tuple[Any, type, type]]:
    """Lists a worker's objects of our classes, each with its class and the parent class."""
    builders = [
        builder
        for groups in worker.model_runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
    ]
    model = worker.model_runner.model
    impls = [module.impl for module in model.modules() if hasattr(module, "impl")]
    return [(each, type(each), type(each).__mro__[1]) for each in (*builders, *impls)]


@contextmanager
def stock_classes(objects: list[tuple[Any, type, type]]) -> Iterator[None]:
    """Gives objects of our classes the parent classes for a while."""
    for each, _, stock in objects:
        each.__class__ = stock
    yield
    for each, own, _ in objects:
        each.__class__ = own


@contextmanager
def unreported() -> Iterator[None]:
    """Leaves out the events that time a layer's work, and the reports of it."""
    from vllm_afbs.backends.cuda import backend
    from vllm_afbs.backends.cuda.meter import DeviceMeter

    with (
        mock.patch.object(backend, "mark", _nothing),
        mock.patch.object(DeviceMeter, "add", _nothing),
    ):
        yield


def _nothing(*_: object) -> None:
    """Replaces a function; a mock would record each call and take longer."""


def time_both(
    without: Without, call: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Times calls in turns without and with the code whose cost is measured, in seconds."""
    bare: list[float] = []
    own: list[float] = []
    call()
    turns: list[tuple[list[float], Without]] = [(bare, without), (own, nullcontext)]
    for _ in range(rounds):
        turns.reverse()
        for samples, state in turns:
            with state():
                samples.append(call())
    return bare, own


def idle(folder: Path, rounds: int) -> list[Row]:
    """Measures what afbs adds to short prompts and decodes without a profile."""
    decodes = list(DECODES)
    engine = Engine(Job("afbs", "AFBS", str(folder), True, SPARSE_FROM, [], 1, decodes=decodes))
    (objects,) = engine.llm.collective_rpc(swappable)
    without = functools.partial(stock_classes, objects)
    rows: list[Row] = []

    def compare(what: str, shape: str, call: Callable[[], float], rounds: int) -> None:
        bare, own = time_both(without, call, rounds)
        rows.append(make_row(f"{what}: FlashAttention's classes", shape, bare, "seconds"))
        rows.append(make_row(f"{what}: afbs's classes", shape, own, "seconds"))
        rows.append(ratio_row(f"{what}: afbs over FlashAttention", shape, own, bare))

    for length in SHORT:
        # A prompt of 512 tokens takes 15 ms, and differences of a percent matter.
        more = max(1, SHORT[-1] // length)
        compare("time to first token", str(length), _first_token(engine, length), rounds * more)
    for decode in decodes:
        call = functools.partial(engine.time_decode, decode)
        compare("time per token", decode.name, call, max(rounds // 5, 3))
    return rows


def reporting(folder: Path, rounds: int) -> list[Row]:
    """Measures what the metrics add to sparse prefills."""
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(folder))
    path = folder / "profile.json"
    write_atomically(path, uniform_profile(fingerprint, TAU, 1 - TAU, list(SPARSE)).to_json())
    os.environ[PROFILE_VARIABLE] = str(path)
    engine = Engine(Job("afbs", "AFBS", str(folder), True, SPARSE[-1] + 256, [], 1))
    rows: list[Row] = []
    for length in SPARSE:
        bare, own = time_both(unreported, _first_token(engine, length), rounds)
        what, shape = "sparse time to first token", f"{length}-density{TAU}"
        rows.append(make_row(f"{what}: without metrics", shape, bare, "seconds"))
        rows.append(make_row(f"{what}: with metrics", shape, own, "seconds"))
        rows.append(ratio_row(f"{what}: with metrics over without", shape, own, bare))
    return rows


def _first_token(engine: Engine, length: int) -> Callable[[], float]:
    draw = random.Random(length)
    prompt = [draw.randrange(10, LLAMA_8B["vocab_size"]) for _ in range(length)]
    return lambda: engine.generate([prompt], 1)[0]


def main() -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    rows: list[Row] = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        for part in (idle, reporting):
            with ProcessPoolExecutor(1, spawn) as process:  # its end frees the GPU
                rows += process.submit(part, Path(name), args.rounds).result()
            report_rows(rows, args.output)


if __name__ == "__main__":
    main()
