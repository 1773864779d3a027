"""One GPU beside two: what is captured, what is answered and what is counted.

    python -m benchmarks.ranks_gpu --output results.csv

The model has Llama-3.1-8B's shapes and random weights. Ranks add up what one rank adds in another
order, so bf16 rounds differently: the dense answers say how much that alone changes.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.load_gpu import make_checkpoint
from benchmarks.profiles import uniform_profile
from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.engine.client import VllmEngine
from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.tuning.capture import capture

LAYERS = (0, 15, 31)
TAU, BLOCK = 0.2, 128


@dataclass(frozen=True)
class Found:
    """What an engine found.

    Attributes:
        taken: The captured layers.
        dense: Losses of the prompt's tokens, dense.
        sparse: The same, sparse.
        products: Block products of the sparse prompt by outcome.
        rows_per_chunk: Most rows that vLLM computes at once.
    """

    taken: Capture
    dense: torch.Tensor
    sparse: torch.Tensor
    products: dict[str, float]


def found_by(folder: Path, num_ranks: int, tokens: list[int], chunk: int) -> Found:
    """Captures, answers and counts with some ranks."""
    serve = [
        str(folder), "--tensor-parallel-size", str(num_ranks), "--max-num-batched-tokens",
        str(chunk), "--gpu-memory-utilization", "0.6",
    ]  # fmt: skip
    target = folder / f"ranks-{num_ranks}"
    target.mkdir()
    windows = {CALIBRATION: tokens}
    with VllmEngine(serve, BLOCK) as engine:
        taken = capture(engine, engine, windows, LAYERS, target, lambda _: None)
        positions = range(len(tokens) - 1)
        dense, _ = engine.score(tokens, positions)
        before = engine.products()
        lengths = [chunk, len(tokens)]
        engine.serve(uniform_profile(engine.fingerprint, TAU, 0.8, lengths), always_sparse=True)
        sparse, _ = engine.score(tokens, positions)
        products = {name: value - before[name] for name, value in engine.products().items()}
    return Found(taken, dense, sparse, products)


def rows_of(one: Found, two: Found, shape: str, num_products: int) -> list[Row]:
    """The differences of two ranks from one."""
    rows = []
    for layer in LAYERS:
        mine, theirs = one.taken.load(layer, CALIBRATION), two.taken.load(layer, CALIBRATION)
        for name in ("query", "key", "value"):
            a, b = getattr(mine, name).float(), getattr(theirs, name).float()
            assert a.shape == b.shape
            difference = float((a - b).abs().sum() / a.abs().sum())
            rows.append(make_row(f"{name} of layer {layer}", shape, [difference], "relative L1"))
    for name in ("dense", "sparse"):
        gaps = (getattr(one, name) - getattr(two, name)).abs().tolist()
        rows.append(make_row(f"loss of a token, {name}, two ranks from one", shape, gaps, "nats"))
    own = (one.dense - one.sparse).abs().tolist()
    rows.append(make_row("loss of a token, sparse from dense, one rank", shape, own, "nats"))
    for name, found in (("one rank", one), ("two ranks", two)):
        counted = sum(found.products.values())
        rows.append(
            make_row(f"{name}: block products counted", shape, [counted / num_products], "of all")
        )
        sparsity = found.products["skipped"] / counted
        rows.append(make_row(f"{name}: sparsity", shape, [sparsity], "ratio"))
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=8192)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        make_checkpoint(folder)
        tokens = [(7919 * i) % 40_000 for i in range(args.length)]
        one, two = (found_by(folder, ranks, tokens, args.chunk) for ranks in (1, 2))
        # Each visible block has two products, in every layer and head.
        visible = sum(
            BlockGeometry(args.chunk, start + args.chunk, BLOCK, BLOCK).num_visible
            for start in range(0, args.length, args.chunk)
        )
        shape = f"Llama-3.1-8B's shapes, {args.length} tokens"
        report_rows(rows_of(one, two, shape, 2 * visible * 32 * 32), args.output)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
