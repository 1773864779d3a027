"""Finds the fastest launch configuration of the Triton prefill kernel for each head size.

    python -m benchmarks.triton_configs --write --output results.csv

``--write`` replaces ``kernels/impl/triton_configs.json``, which the kernel reads.
"""

import dataclasses
import functools
import itertools
import json
import statistics

import torch
import triton

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.lists import random_blocks
from benchmarks.prefill_gpu import BLOCK, Case
from benchmarks.timing import time_in_turns
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import PrefillFeatures, TileLists, build_tile_lists
from vllm_afbs.kernels.impl.triton_prefill import CONFIGS, LaunchConfig, triton_prefill

HEAD_DIMS = (64, 96, 128, 256)
LENGTH = 16384
DENSITY = 0.2


def candidates(head_dim: int) -> list[LaunchConfig]:
    """Lists configurations that may fit into an H100's shared memory."""
    block_ns = (64, 128) if head_dim <= 128 else (32, 64)
    return [LaunchConfig(*each) for each in itertools.product(block_ns, (4, 8), (2, 3))]


def attend(case: Case, lists: TileLists, config: LaunchConfig) -> None:
    """Runs the kernel alone."""
    triton_prefill(case.step, lists, case.output, case.scale, PrefillFeatures(), config)


def measure(head_dim: int, rounds: int) -> tuple[list[Row], LaunchConfig]:
    """Times every candidate that fits, in turns; returns the rows and the fastest."""
    case = Case(LENGTH, 32, 8, head_dim, structured=False)
    generator = torch.Generator("cuda").manual_seed(0)
    keep = random_blocks(32, case.geometry, 1 - DENSITY, generator)
    lists = build_tile_lists(keep.flip(1))
    functions = {}
    for config in candidates(head_dim):
        try:
            attend(case, lists, config)
        except triton.runtime.errors.OutOfResources:
            continue
        functions[str(config)] = functools.partial(attend, case, lists, config)
    seconds = time_in_turns(functions, rounds)
    shape = f"L{LENGTH}-H32/8-D{head_dim}-block{BLOCK}-density{DENSITY}"
    rows = [make_row(name, shape, values, "seconds") for name, values in seconds.items()]
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return rows, functions[best].args[2]


def main() -> None:
    """Runs the sweep."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"replace {CONFIGS.name}")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    fastest = {}
    for head_dim in HEAD_DIMS:
        more, config = measure(head_dim, args.rounds)
        rows += more
        fastest[head_dim] = config
    report_rows(rows, args.output)
    if args.write:
        lines = [
            f'  "{size}": {json.dumps(dataclasses.asdict(config))}'
            for size, config in fastest.items()
        ]
        write_atomically(CONFIGS, "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
