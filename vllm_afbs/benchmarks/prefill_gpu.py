"""Sparse prefill attention on an NVIDIA GPU beside dense FlashAttention 3, for given densities.

    python -m vllm_afbs.benchmarks.prefill_gpu --output results.csv

Blocks are drawn at random. Four ways on the same numbers: FlashAttention 3 dense; the same kernel
over tiles (one launch, cache with the KV heads outside the pages), regrouping included; the same
with the Triton selector and the building of block tables; and our Triton kernel.
"""

import functools
from collections.abc import Callable

import torch
from vllm.vllm_flash_attn import flash_attn_varlen_func

from vllm_afbs.benchmarks.lists import random_blocks
from vllm_afbs.benchmarks.table import (
    Row,
    layer_parser,
    make_row,
    ratio_row,
    report_rows,
    time_in_turns,
)
from vllm_afbs.kernels import (
    BlockGeometry,
    HeadThresholds,
    TileLists,
    TileTables,
    build_tile_lists,
    tile_prefill,
)
from vllm_afbs.kernels.triton_prefill import triton_prefill
from vllm_afbs.kernels.triton_selection import (
    pool_key_pages,
    pool_query_blocks,
    select_tile_lists,
)
from vllm_afbs.kernels.triton_tables import build_tile_tables_on_device

LENGTHS = (8192, 32768, 131072)
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
PAGE_SIZE = BLOCK = 128
MAX_RELATIVE_L1 = 5e-3  # twice what either kernel shows against fp64 in bf16


class Case:
    """One layer's prefill of a whole prompt with random contents, pages shuffled."""

    def __init__(self, length: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        """Fills the cache in both of vLLM's layouts."""
        num_pages = length // PAGE_SIZE
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.scale = head_dim**-0.5
        self.query = torch.randn(length, num_heads, head_dim, **options)  # type: ignore[call-overload]
        self.output = torch.empty_like(self.query)
        shape = (num_pages, PAGE_SIZE, num_kv_heads, head_dim)
        self.key, self.value = (torch.randn(shape, **options) for _ in range(2))  # type: ignore[call-overload]
        self.key_by_head, self.value_by_head = (
            cache.transpose(1, 2).reshape(-1, PAGE_SIZE, 1, head_dim)
            for cache in (self.key, self.value)
        )
        self.pages = torch.randperm(num_pages, device="cuda").to(torch.int32)
        self.geometry = BlockGeometry(length, length, BLOCK, BLOCK)

    def dense(self) -> None:
        """Runs FlashAttention 3 on the whole prompt."""
        length = len(self.query)
        starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        whole = TileTables(starts, starts[1:], self.pages[None])
        self._flash(self.query, self.output, whole, self.key, self.value, length)

    def tiles(self, tables: TileTables) -> None:
        """Runs FlashAttention 3 tile by tile in one launch."""

        def dense(query: torch.Tensor, output: torch.Tensor, tables: TileTables) -> None:
            self._flash(query, output, tables, self.key_by_head, self.value_by_head, BLOCK)

        tile_prefill(self.query, self.output, tables, dense)

    def triton(self, lists: TileLists) -> None:
        """Runs our kernel."""
        triton_prefill(
            self.query, self.key, self.value, self.output, self.pages, lists, self.geometry,
            self.scale, block_n=128, num_warps=8, num_stages=3,
        )  # fmt: skip

    def tables(self, lists: TileLists) -> TileTables:
        """Builds the tiles' block tables."""
        return build_tile_tables_on_device(
            lists, self.geometry, self.pages, PAGE_SIZE, self.key.shape[2]
        )

    def select(self) -> TileLists:
        """Chooses blocks; the thresholds' values do not change the time."""
        num_heads = self.query.shape[1]
        thresholds = HeadThresholds(
            torch.full((num_heads,), 0.9, device="cuda"),
            torch.full((num_heads,), 0.2, device="cuda"),
        )
        return select_tile_lists(
            pool_query_blocks(self.query, self.geometry),
            pool_key_pages(self.key, self.pages, self.geometry),
            thresholds,
            self.geometry,
            self.scale,
        )

    def whole(self, lists: TileLists) -> None:
        """Does all that a layer does: selects, then attends to the given blocks."""
        self.select()
        self.tiles(self.tables(lists))

    def _flash(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        tables: TileTables,
        key: torch.Tensor,
        value: torch.Tensor,
        max_q_len: int,
    ) -> None:
        flash_attn_varlen_func(
            query, key, value, out=output, causal=True, fa_version=3,
            softmax_scale=self.scale, block_table=tables.block_table,
            max_seqlen_q=max_q_len, cu_seqlens_q=tables.query_start_loc,
            max_seqlen_k=len(self.query), seqused_k=tables.seq_lens,
        )  # fmt: skip


def measure(case: Case, density: float, rounds: int) -> list[Row]:
    """Times every way in turns for one length and density.

    Raises:
        RuntimeError: The two sparse kernels do not agree.
    """
    length, num_heads, head_dim = case.query.shape
    generator = torch.Generator().manual_seed(0)
    keep = random_blocks(num_heads, case.geometry, 1 - density, generator)
    reached = int(keep.sum()) / (num_heads * case.geometry.num_visible)
    lists = build_tile_lists(keep.cuda())
    tables = case.tables(lists)
    _check_agreement(case, tables, lists)
    functions: dict[str, Callable[[], object]] = {
        "FA3 dense": case.dense,
        "FA3 tiles": functools.partial(case.tiles, tables),
        "FA3 tiles and selection": functools.partial(case.whole, lists),
        "Triton": functools.partial(case.triton, lists),
        "tile tables": functools.partial(case.tables, lists),
        "selector": case.select,
    }
    seconds = time_in_turns(functions, rounds)
    shape = f"L{length}-H{num_heads}/{case.key.shape[2]}-D{head_dim}-density{reached:.3f}"
    rows = [make_row(name, shape, values, "seconds") for name, values in seconds.items()]
    for name in ("FA3 tiles", "FA3 tiles and selection", "Triton"):
        rows.append(ratio_row(f"{name}: speedup", shape, seconds["FA3 dense"], seconds[name]))
    return rows


def _check_agreement(case: Case, tables: TileTables, lists: TileLists) -> None:
    case.tiles(tables)
    by_tiles = case.output.clone()
    case.triton(lists)
    error = float((case.output - by_tiles).abs().sum() / by_tiles.abs().sum())
    if not error <= MAX_RELATIVE_L1:
        raise RuntimeError(f"FA3 tiles and Triton differ by {error:.2e} (relative L1)")


def main() -> None:
    """Runs the benchmark."""
    parser = layer_parser((__doc__ or "").splitlines()[0], 32, 8, 128)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for length in LENGTHS:
        case = Case(length, args.num_heads, args.num_kv_heads, args.head_dim)
        for density in DENSITIES:
            rows += measure(case, density, args.rounds)
    report_rows(rows, args.output)


if __name__ == "__main__":
    main()
