"""Finds the fastest launch configuration of the Triton prefill kernel for each shape of tiles.

    python -m benchmarks.triton_configs --write --output results.csv

``--write`` sets the measured shapes' rows of ``kernels/impl/triton_configs.json``, which the kernel
reads.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.lists import random_blocks
from benchmarks.prefill_gpu import BLOCK, Case, LayerCase, check_agreement
from benchmarks.timing import time_in_turns
from vllm_afbs.commands.results import Row, make_row, write_rows
from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import TileLists, build_tile_lists
from vllm_afbs.kernels.impl.triton_prefill import (
    CONFIGS,
    LaunchConfig,
    TileShape,
    read_configs,
    triton_prefill,
)

HEAD_DIMS = (64, 128)
BLOCKS = (128, 64)
LENGTH = 16384
DENSITY = 0.2


def candidates(shape: TileShape) -> list[LaunchConfig]:
    """Lists configurations that may fit into an H100's shared memory."""
    block_ns = (64, 128) if shape.head_dim <= 128 else (32, 64)
    # Keys are found through two other loads, so 3 and 4 stages prefetch as far as 2, and 5 further.
    # Several small programs run on a processor, which hides loads without any prefetching.
    num_stages = (1, 2, 3, 5) if shape.block_q < BLOCK else (2, 3, 5)
    return [LaunchConfig(*each) for each in itertools.product(block_ns, (4, 8), num_stages)]


def attend(case: Case, lists: TileLists, config: LaunchConfig) -> None:
    """Runs the kernel alone."""
    triton_prefill(case.step, lists, case.output, case.scale, 0.0, config)


def measure(shape: TileShape, page_size: int, rounds: int) -> tuple[list[Row], LaunchConfig]:
    """Times every candidate that fits, in turns; returns the rows and the fastest.

    Raises:
        RuntimeError: Two candidates do not agree.
    """
    layer = LayerCase(LENGTH, 32, 8, shape.head_dim, shape.block_q, shape.block_k, page_size)
    case = Case(layer, structured=False)
    generator = torch.Generator("cuda").manual_seed(0)
    keep = random_blocks(32, case.geometry, 1 - DENSITY, generator)
    lists = build_tile_lists(keep.flip(1))
    functions, expected = {}, None
    for config in candidates(shape):
        try:
            attend(case, lists, config)
        except triton.runtime.errors.OutOfResources:
            continue
        if expected is None:
            expected = case.output.clone()
        check_agreement(case.output, expected, f"{config} and the first configuration")
        functions[str(config)] = functools.partial(attend, case, lists, config)
    seconds = time_in_turns(functions, rounds)
    name = (
        f"L{LENGTH}-H32/8-D{shape.head_dim}-block{shape.block_q}x{shape.block_k}-page{page_size}"
        f"-density{DENSITY}"
    )
    rows = [make_row(config, name, values, "seconds") for config, values in seconds.items()]
    best = min(seconds, key=lambda config: statistics.median(seconds[config]))
    return rows, functions[best].args[2]


def write_configs(configs: Mapping[TileShape, LaunchConfig], path: Path = CONFIGS) -> None:
    """Writes launch configurations by shape as JSON, one row on each line."""
    rows = ",\n  ".join(
        json.dumps({"shape": asdict(shape), "config": asdict(config)})
        for shape, config in configs.items()
    )
    write_atomically(path, f"[\n  {rows}\n]\n")


def main() -> None:
    """Runs the sweep."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--block-q", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--block-k", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--page-size", type=int, default=BLOCK, help="keys of a page")
    parser.add_argument("--write", action="store_true", help=f"update {CONFIGS.name}")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    fastest = read_configs()
    for sizes in itertools.product(args.head_dims, args.block_q, args.block_k):
        shape = TileShape(*sizes)
        more, fastest[shape] = measure(shape, args.page_size, args.rounds)
        rows += more
        if args.output:
            write_rows(args.output, rows)  # a long run that is cut off keeps what it has
    report_rows(rows, args.output)
    if args.write:
        write_configs(fastest)


if __name__ == "__main__":
    main()
