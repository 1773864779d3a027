"""Sparse prefill attention on an NVIDIA GPU beside dense FlashAttention, for given densities.

    python -m benchmarks.prefill_gpu --output results.csv

``--block-k 64``, for example, takes smaller key blocks, on pages of 128 as a server has them.

Three ways on the same numbers: FlashAttention dense, version 3 of it over tiles, and our Triton
kernel (at density 1 it is the dense Triton kernel). The sparse times are everything the backend
does for a layer: packing and pooling Q, scoring K in the cache, selection, writing lists or block
tables, attention, and unpacking (theta is off, as in nearly all tuned heads; what the keys'
self-similarity adds is timed apart). Selection runs for real; the blocks then computed are drawn at
random to hit the density exactly, or, with ``selected`` in the shape, are those it chose from
structured keys. Density is the share of the causal block products; blocks of another size than 128
have another causal area, a little smaller where they are smaller.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import layer_parser, report_rows
from benchmarks.dispatch_measurements import update_measurements, write_measurements
from benchmarks.lists import random_blocks, tile_tables
from benchmarks.timing import ratio_row, time_in_turns
from vllm_afbs import compat
from vllm_afbs.backends.cuda.card import Card
from vllm_afbs.backends.cuda.dispatch import (
    KERNEL_CHOICES,
    KernelChoice,
    LayerKind,
    Measurement,
    Measurements,
    variant_name,
)
from vllm_afbs.backends.cuda.pages import PAGE_SIZE
from vllm_afbs.backends.cuda.sparse import (
    Layer,
    SparsePrefill,
    make_prefills,
)
from vllm_afbs.commands.results import Row, make_row, write_rows
from vllm_afbs.kernels import (
    THETA_OFF,
    BlockGeometry,
    HeadThresholds,
    PackedTiles,
    PrefillRequest,
    StepInputs,
    build_tile_lists,
    cut_query_blocks,
)

LENGTHS = (8192, 32768, 65536, 131072)
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
SELECTED_DENSITIES = (0.2, 0.1)
BLOCK = 128
STRUCTURE = 128  # rows of a structured prompt that are alike
HOST_CALLS = 20
MAX_RELATIVE_L1 = 5e-3  # twice what either kernel shows against fp64 in bf16
MAX_RELATIVE_L1_FP8 = 0.0625
"""Half of FP8's own precision, to which FlashAttention rounds probabilities."""
FP8_SCALE = 1 / 32
"""What FP8 queries, keys and values are multiplied by; the largest of them stay below 448."""


@dataclass(frozen=True)
class LayerCase:
    """The shape of a layer's prefill.

    Attributes:
        length: Tokens of the prompt.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Size of a head.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        page_size: Keys of a page.
        is_fp8: Whether queries, keys and values are in FP8.
        has_sinks: Whether every head has a sink.
    """

    length: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_q: int = BLOCK
    block_k: int = BLOCK
    page_size: int = BLOCK
    is_fp8: bool = False
    has_sinks: bool = False

    @property
    def kind(self) -> LayerKind:
        """Its kind, for the dispatcher."""
        variant = variant_name(self.is_fp8, self.has_sinks)
        return LayerKind(self.head_dim, self.block_q, self.block_k, variant)

    @property
    def name(self) -> str:
        """The shape in the results; blocks and pages of 128 go without saying."""
        name = f"L{self.length}-H{self.num_heads}/{self.num_kv_heads}-D{self.head_dim}"
        if (self.block_q, self.block_k, self.page_size) != (BLOCK, BLOCK, BLOCK):
            name += f"-block{self.block_q}x{self.block_k}-page{self.page_size}"
        return f"{name}-{self.kind.variant}" if self.kind.variant else name

    def measurement(self, density: float, seconds: dict[KernelChoice, float]) -> Measurement:
        """A row of the dispatcher."""
        return Measurement(
            self.head_dim, self.num_heads, self.length, density, seconds,
            self.block_q, self.block_k, self.kind.variant,
        )  # fmt: skip


class Case:
    """One layer's prefill of a whole prompt, pages shuffled.

    Queries and keys are random, or, where ``structured``, wander from block to block, so that
    near and recurring blocks attract each other as a real head's do.
    """

    def __init__(self, shape: LayerCase, structured: bool, version: int = 3) -> None:
        """Fills a cache of vLLM's default layout; ``version`` is FlashAttention's."""
        self.shape, self.version = shape, version
        length, page_size, head_dim = shape.length, shape.page_size, shape.head_dim
        num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
        num_pages = length // page_size
        cache = torch.randn(
            (num_pages, page_size, num_kv_heads, 2 * head_dim), device="cuda", dtype=torch.bfloat16
        )
        query = torch.randn(length, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
        self.pages = torch.randperm(num_pages, device="cuda").to(torch.int32)
        if structured:
            walk = torch.randn(length // STRUCTURE, num_kv_heads, head_dim, device="cuda").cumsum(0)
            walk = (walk * (0.9 / walk.std())).repeat_interleave(STRUCTURE, 0)
            cache[self.pages.long(), :, :, :head_dim] += walk.unflatten(0, (num_pages, page_size))
            query += walk.repeat_interleave(num_heads // num_kv_heads, 1)
        self._flash_attention = compat.flash_attention()
        self.scale = head_dim**-0.5
        self.geometry = BlockGeometry(length, length, shape.block_q, shape.block_k)
        blocks = cut_query_blocks([PrefillRequest(0, 0, self.geometry)], torch.device("cuda"))
        self.output = torch.empty_like(query)
        scales = None
        if shape.is_fp8:
            # vLLM gives FlashAttention 3 queries in FP8 as well.
            query, cache = ((x / FP8_SCALE).to(torch.float8_e4m3fn) for x in (query, cache))
            scales = torch.full((3, num_kv_heads), FP8_SCALE, device="cuda")
        sinks = torch.randn(num_heads, device="cuda").bfloat16() if shape.has_sinks else None
        key, value = cache.split(head_dim, dim=-1)
        self.step = StepInputs(query, key, value, self.pages[None], blocks, sinks, scales)
        self.starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        self.num_kept = torch.zeros(num_heads, dtype=torch.int64, device="cuda")
        self.num_blocks = num_heads * blocks.num_visible

    def ways(self, tau: float, has_theta: bool = False) -> dict[KernelChoice, SparsePrefill]:
        """The backend's ways of sparse prefill, of a layer whose heads have no theta or one."""
        num_heads = self.step.query.shape[1]
        thresholds = HeadThresholds(
            torch.full((num_heads,), tau, device="cuda"),
            torch.full((num_heads,), THETA_OFF, device="cuda"),
            has_theta,
        )
        layer = Layer(thresholds, self.scale, 0.0)
        return make_prefills(layer, self.version)

    def dense(self) -> None:
        """Runs FlashAttention on the whole prompt, as vLLM's FLASH_ATTN does."""
        length, starts = len(self.step.query), self.starts
        more: dict[str, torch.Tensor] = {}
        if self.step.sinks is not None:
            more["s_aux"] = self.step.sinks
        if self.step.scales is not None:
            names = ("q_descale", "k_descale", "v_descale")
            more |= {name: scale[None] for name, scale in zip(names, self.step.scales, strict=True)}
        self._flash_attention(
            self.step.query, self.step.key_cache, self.step.value_cache, out=self.output,
            cu_seqlens_q=starts, max_seqlen_q=length, seqused_k=starts[1:], max_seqlen_k=length,
            softmax_scale=self.scale, causal=True, block_table=self.step.block_table,
            fa_version=self.version, **more,
        )  # fmt: skip

    def run(self, way: SparsePrefill, replaced: Any) -> None:
        """Does all that a layer does; attends to other blocks than the chosen ones if given."""
        chosen = way.choose(self.step, self.num_kept)
        way.attend(self.step, chosen if replaced is None else replaced, self.output)

    def calls(
        self, ways: dict[KernelChoice, SparsePrefill], replaced: dict[KernelChoice, Any]
    ) -> dict[KernelChoice, Callable[[], object]]:
        """Everything that a layer does, in every way; see ``run``."""
        calls: dict[KernelChoice, Callable[[], object]] = {"dense": self.dense}
        for name, way in ways.items():
            calls[name] = functools.partial(self.run, way, replaced.get(name))
        return calls

    def density(self, tau: float) -> float:
        """Share of the blocks that selection keeps at this tau."""
        self.num_kept.zero_()
        self.ways(tau)["triton"].choose(self.step, self.num_kept)
        return int(self.num_kept.sum()) / self.num_blocks

    def tau_for(self, density: float) -> float:
        """The tau at which selection keeps this share of the blocks, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if self.density(middle) < density else (low, middle)
        return high

    def random(self, density: float) -> tuple[float, dict[KernelChoice, Any]]:
        """Random blocks: the density reached, and the blocks as each way takes them."""
        num_heads = self.step.query.shape[1]
        generator = torch.Generator("cuda").manual_seed(0)
        keep = random_blocks(num_heads, self.geometry, 1 - density, generator)
        lists = build_tile_lists(keep.flip(1))
        reached = int(keep.sum()) / self.num_blocks
        tiles_way = self.ways(1.0).get("tiles")
        if tiles_way is None:
            return reached, {"triton": lists}
        chosen = tiles_way.choose(self.step, self.num_kept)
        tables = tile_tables(lists, self.step.blocks, self.step.key_cache, self.pages)
        tiles = PackedTiles(chosen.query, tables)
        return reached, {"tiles": tiles, "triton": lists}


def measure(
    case: Case, tau: float, replaced: dict[KernelChoice, Any], shape: str, rounds: int
) -> tuple[list[Row], dict[KernelChoice, float]]:
    """Times every way in turns.

    Args:
        case: The prompt.
        tau: What selection runs with.
        replaced: Blocks to attend to by way, instead of the chosen ones; may be empty.
        shape: For the rows.
        rounds: Timed calls of each.

    Returns:
        The rows, and the median seconds by way.

    Raises:
        RuntimeError: The two sparse kernels do not agree.
    """
    ways = case.ways(tau)
    functions: dict[str, Callable[[], object]] = dict(case.calls(ways, replaced).items())
    with_theta = case.ways(tau, has_theta=True)
    first: KernelChoice = "tiles" if "tiles" in ways else "triton"
    for name, each in ((f"selection for {first}", ways), ("the same with guards", with_theta)):
        functions[name] = functools.partial(each[first].choose, case.step, case.num_kept)
    if "tiles" in ways:
        functions["tiles"]()
        by_tiles = case.output.clone()
        case.output.zero_()
        functions["triton"]()
        check_agreement(case.output, by_tiles, "FA3 tiles and Triton", case.shape.is_fp8)
    seconds = time_in_turns(functions, rounds)
    rows = [make_row(name, shape, values, "seconds") for name, values in seconds.items()]
    rows += [
        ratio_row(
            f"{name}: speedup over dense FA{case.version}", shape, seconds["dense"], seconds[name]
        )
        for name in ways
    ]
    medians = {way: statistics.median(seconds[way]) for way in KERNEL_CHOICES if way in seconds}
    return rows, medians


def measure_host(case: Case, rounds: int) -> tuple[list[Row], dict[KernelChoice, float]]:
    """Times what issuing a layer takes the host, the device following on its own.

    Returns:
        The rows, and the median seconds by way.
    """
    functions = case.calls(case.ways(0.9), {})
    seconds: dict[KernelChoice, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(HOST_CALLS):  # few enough for the device's queue to take them all
                function()
            seconds[name].append((time.perf_counter() - start) / HOST_CALLS)
    rows = [
        make_row(f"{name}: host", "any", samples, "seconds") for name, samples in seconds.items()
    ]
    return rows, {name: statistics.median(samples) for name, samples in seconds.items()}


def check_agreement(
    output: torch.Tensor, expected: torch.Tensor, what: str, is_fp8: bool = False
) -> None:
    """Compares two results of the same attention.

    Raises:
        RuntimeError: They differ by more than rounding.
    """
    error = float((output - expected).abs().sum() / expected.abs().sum())
    if not error <= (MAX_RELATIVE_L1_FP8 if is_fp8 else MAX_RELATIVE_L1):
        raise RuntimeError(f"{what} differ by {error:.2e} (relative L1)")


def main() -> None:
    """Runs the benchmark."""
    parser = layer_parser(__doc__, 32, 8, 128)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--block-q", type=int, default=BLOCK, help="rows of a query block")
    parser.add_argument("--block-k", type=int, default=BLOCK, help="keys of a key block")
    parser.add_argument("--page-size", type=int, default=PAGE_SIZE, help="keys of a page")
    parser.add_argument("--flash-attention-version", type=int, default=3, help="default: 3")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--sinks", action="store_true", help="give every head a sink")
    parser.add_argument(
        "--dispatch",
        type=Path,
        help="JSON of the dispatcher, whose rows of this head size, blocks, cache and sinks to set",
    )
    args = parser.parse_args()
    is_fp8 = args.kv_cache_dtype == "fp8"
    if (is_fp8 or args.sinks) and args.flash_attention_version != 3:
        parser.error("--kv-cache-dtype fp8 and --sinks: --flash-attention-version 3 expected")
    torch.manual_seed(0)
    rows: list[Row] = []
    measured = []
    for length in args.lengths:
        version = args.flash_attention_version
        shape = LayerCase(
            length, args.num_heads, args.num_kv_heads, args.head_dim,
            args.block_q, args.block_k, args.page_size,
            is_fp8, args.sinks,
        )  # fmt: skip
        case = Case(shape, structured=False, version=version)
        for density in args.densities:
            reached, blocks = case.random(density)
            more, medians = measure(
                case, 0.9, blocks, f"{shape.name}-density{reached:.3f}", args.rounds
            )
            rows += more
            measured.append(shape.measurement(reached, medians))
        if length == min(args.lengths):
            more, host_seconds = measure_host(case, args.rounds)
            rows += more
        del case, blocks
        case = Case(shape, structured=True, version=version)
        for density in SELECTED_DENSITIES:
            tau = case.tau_for(density)
            name = f"{shape.name}-density{case.density(tau):.3f}-selected"
            rows += measure(case, tau, {}, name, args.rounds)[0]
        del case
        if args.output:
            write_rows(args.output, rows)  # a long run that is cut off keeps what it has
    report_rows(rows, args.output)
    if args.dispatch:
        card = Card.of_worker(args.flash_attention_version).name
        known = Measurements.read(args.dispatch)
        updated = update_measurements(known.get(card), host_seconds, measured)
        write_measurements(args.dispatch, known | {card: updated})


if __name__ == "__main__":
    main()
