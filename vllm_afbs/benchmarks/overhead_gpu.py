"""What afbs adds where it does nothing: short prompts and decodes, on an NVIDIA GPU.

    python -m vllm_afbs.benchmarks.overhead_gpu --output results.csv

One engine of Llama-3.1-8B's shapes, with random weights. From call to call its layers and metadata
builders are turned into FlashAttention's own and back, so that both are timed in the same process
on the same cache, where two processes differ by more than a percent by themselves.
"""

import functools
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_afbs.benchmarks.engine import ENVIRONMENT, Engine, Job
from vllm_afbs.benchmarks.serving_gpu import DECODES, LLAMA_8B, SHORT
from vllm_afbs.benchmarks.table import Row, benchmark_parser, make_row, ratio_row, report_rows


def swappable(worker: Any) -> list[tuple[Any, type, type]]:
    """The objects of ours in a worker, each with its class and with its parent's."""
    builders = [
        builder
        for groups in worker.model_runner.attn_groups
        for group in groups
        for builder in group.metadata_builders
    ]
    model = worker.model_runner.model
    impls = [module.impl for module in model.modules() if hasattr(module, "impl")]
    return [(each, type(each), type(each).__mro__[1]) for each in (*builders, *impls)]


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds to a prompt's first token."""
    return engine.generate([prompt], 1)[0]


def time_both(
    objects: list[tuple[Any, type, type]], call: Callable[[], float], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds with the parents' classes and with ours, in turns."""
    stock: list[float] = []
    own: list[float] = []
    call()
    turns = [(stock, 2), (own, 1)]
    for _ in range(rounds):
        turns.reverse()
        for samples, place in turns:
            for each in objects:
                each[0].__class__ = each[place]
            samples.append(call())
    return stock, own


def rows_of(what: str, shape: str, stock: list[float], own: list[float]) -> list[Row]:
    """The figures and their ratio."""
    return [
        make_row(f"{what}: FlashAttention's classes", shape, stock, "seconds"),
        make_row(f"{what}: afbs's classes", shape, own, "seconds"),
        ratio_row(f"{what}: afbs over FlashAttention", shape, own, stock),
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    draw = random.Random(0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        job = Job("afbs", "AFBS", folder, True, 8192, [], 1, decodes=list(DECODES))
        engine = Engine(job)
        (objects,) = engine.llm.collective_rpc(swappable)
        for length in SHORT:
            prompt = [draw.randrange(10, LLAMA_8B["vocab_size"]) for _ in range(length)]
            call = functools.partial(first_token, engine, prompt)
            # A prompt of 512 tokens takes 15 ms, of which a hundredth is what is looked for.
            rounds = args.rounds * max(1, SHORT[-1] // length)
            pair = time_both(objects, call, rounds)
            rows += rows_of("time to first token", str(length), *pair)
        for decode in DECODES:
            call = functools.partial(engine.time_decode, decode)
            pair = time_both(objects, call, max(args.rounds // 5, 3))
            rows += rows_of("time per token", decode.name, *pair)
    report_rows(rows, args.output)


if __name__ == "__main__":
    main()
