"""Sparse prefill attention on CPU beside vLLM's own CPU_ATTN, for given sparsities.

    python -m benchmarks.prefill_cpu --output results.csv

``--blocks 128x128 64x64`` compares shapes of blocks.

The sparse time covers everything that the backend does for a layer: scoring K in the cache,
selection, building the tile tables, regrouping Q and the output, and the kernel. The selector runs
on the random data, but the blocks that are computed are drawn at random to reach the sparsity
exactly. Pages are as long as key blocks, for dense attention, too. All blocks of one length are
timed in turns.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from benchmarks.command import layer_parser, report_rows
from benchmarks.lists import random_blocks
from benchmarks.timing import ratio_row, time_in_turns
from vllm_afbs.backends.cpu.sparse import (
    CacheFormat,
    SparsePrefill,
    dense_paged_attention,
    split_cache,
)
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.kernels import BlockGeometry, HeadThresholds, TileTables
from vllm_afbs.kernels.query_blocks import PrefillRequest

LENGTHS = (2048, 4096, 8192)
SPARSITIES = (0.0, 0.5, 0.8)


class Case:
    """One layer's prefill of a whole prompt with random contents."""

    def __init__(
        self,
        length: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        cache: CacheFormat,
        block_q: int,
    ) -> None:
        """Fills a paged cache in shuffled page order; key blocks are pages."""
        num_pages = length // cache.page_size
        self.cache = cache
        self.scale = head_dim**-0.5
        key = torch.randn(length, num_kv_heads, head_dim).to(cache.dtype)
        self.query = torch.randn(length, num_heads, head_dim).to(cache.dtype)
        self.output = torch.empty_like(self.query)
        self.kv_cache = torch.zeros(
            num_pages, num_kv_heads, cache.page_size, 2 * head_dim, dtype=cache.dtype
        )
        pages = torch.randperm(num_pages, dtype=torch.int32)
        slots = pages.repeat_interleave(cache.page_size) * cache.page_size
        slots += torch.arange(cache.page_size).repeat(num_pages)
        ops.cpu_attn_reshape_and_cache(
            key, torch.randn_like(key), *split_cache(self.kv_cache), slots.long(), cache.isa
        )
        geometry = BlockGeometry(length, length, block_q, cache.page_size)
        self.request, self.pages = PrefillRequest(0, 0, geometry), pages
        thresholds = HeadThresholds(torch.full((num_heads,), 0.9), torch.zeros(num_heads))
        self.sparse = SparsePrefill(thresholds, num_kv_heads, head_dim, self.scale, cache)

    def dense(self) -> None:
        """Runs CPU_ATTN on the whole prompt."""
        length = len(self.query)
        whole = TileTables(
            torch.tensor([0, length], dtype=torch.int32),
            torch.tensor([length], dtype=torch.int32),
            self.pages[None],
        )
        dense_paged_attention(self.query, self.output, self.kv_cache, whole, self.scale, self.cache)

    def select(self) -> torch.Tensor:
        """Chooses blocks as the backend does."""
        return self.sparse.select(self.query, self.kv_cache, self.request, self.pages)

    def attend(self, keep: torch.Tensor) -> None:
        """Selects, then attends to the given blocks instead of the selected ones."""
        self.select()
        tables = self.sparse.tables(keep, self.request, self.pages)
        self.sparse.attend(self.query, self.output, self.kv_cache, self.request, tables)

    @property
    def shape(self) -> str:
        """The shape in the results; blocks of 128 go without saying."""
        length, num_heads, head_dim = self.query.shape
        geometry = self.request.geometry
        name = f"L{length}-H{num_heads}/{self.kv_cache.shape[1]}-D{head_dim}-{self.cache.isa}"
        if (geometry.block_q, geometry.block_k) != (128, 128):
            name += f"-block{geometry.block_q}x{geometry.block_k}"
        return name


def measure(
    cases: list[Case], sparsities: Sequence[float], rounds: int, generator: torch.Generator
) -> list[Row]:
    """Times dense and sparse of all cases in turns."""
    functions: dict[tuple[str, str], Callable[[], object]] = {}
    reached: dict[tuple[str, str], float] = {}
    for case in cases:
        functions[case.shape, "dense"] = case.dense
        functions[case.shape, "selector"] = case.select
        geometry, num_heads = case.request.geometry, case.query.shape[1]
        for sparsity in sparsities:
            keep = random_blocks(num_heads, geometry, sparsity, generator)
            label = case.shape, f"sparse {sparsity:.1f}"
            reached[label] = 1 - int(keep.sum()) / (num_heads * geometry.num_visible)
            functions[label] = functools.partial(case.attend, keep)
    seconds = time_in_turns(functions, rounds)
    rows = [make_row(name, shape, values, "seconds") for (shape, name), values in seconds.items()]
    for (shape, name), sparsity in reached.items():
        what = f"speedup at sparsity {sparsity:.3f}"
        rows.append(ratio_row(what, shape, seconds[shape, "dense"], seconds[shape, name]))
    return rows


def _blocks(text: str) -> tuple[int, int]:
    block_q, block_k = (int(size) for size in text.split("x"))
    return block_q, block_k


def main() -> None:
    """Runs the benchmark."""
    parser = layer_parser(__doc__, 9, 3, 64)
    parser.add_argument("--isa", default="vec", help="vLLM's CPU kernels: vec, vec16, amx, ...")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument(
        "--blocks", type=_blocks, nargs="+", default=[(128, 128)],
        help="rows of query blocks and keys of key blocks, as 64x128",
    )  # fmt: skip
    args = parser.parse_args()
    current_platform.import_kernels()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for length in args.lengths:
        cases = [
            Case(
                length, args.num_heads, args.num_kv_heads, args.head_dim,
                CacheFormat(args.isa, block_k, torch.bfloat16), block_q,
            )
            for block_q, block_k in args.blocks
        ]  # fmt: skip
        rows += measure(cases, args.sparsities, args.rounds, generator)
    report_rows(rows, args.output)


if __name__ == "__main__":
    main()
