"""Every implementation of ``sparse_prefill`` against the fp64 reference.

The Triton kernel runs compiled on a GPU, and in Triton's interpreter without one.
"""

from functools import partial

import pytest
import torch

from tests.batches import Batch, draw_sinks, make_batch, quantise
from tests.interpreted import INTERPRETED, assert_passes_interpreted, paged
from tests.problems import SCALE, PagedDense, Problem, make_problem, relative_l1
from vllm_afbs.kernels import (
    PrefillRequest,
    StepInputs,
    TileLists,
    build_tile_lists,
    build_tile_tables,
    cut_query_blocks,
    sparse_prefill,
    tile_prefill,
)
from vllm_afbs.kernels.api import SparsePrefill
from vllm_afbs.kernels.impl.triton_prefill import (
    LaunchConfig,
    TileShape,
    fastest_config,
    read_configs,
    triton_prefill,
)
from vllm_afbs.kernels.reference import reference_attention


def one_request(
    q_len: int, kv_len: int, block_q: int, block_k: int, page_size: int, head_dim: int,
    dtype: torch.dtype,
) -> Batch:  # fmt: skip
    """A step of one request, which unlike ``make_batch``'s may have two block sizes."""
    problem = make_problem(q_len, kv_len, block_q, block_k, 2, 2, head_dim, page_size)
    problem.query, problem.key, problem.value = (
        rows.to(dtype) for rows in (problem.query, problem.key, problem.value)
    )
    caches = [paged(rows, problem.pages, page_size) for rows in (problem.key, problem.value)]
    blocks = cut_query_blocks([PrefillRequest(0, 1, problem.geometry)], torch.device("cpu"))
    block_table = torch.stack([torch.zeros_like(problem.pages), problem.pages]).to(torch.int32)
    return Batch([problem], blocks, problem.query, *caches, block_table)


def kept_blocks(problem: Problem, kind: str) -> torch.Tensor:
    """Random and adversarial lists."""
    geometry, num_heads = problem.geometry, problem.query.shape[1]
    generator = torch.Generator().manual_seed(1)
    shape = (num_heads, *geometry.visible.shape)
    chosen = {
        "random": torch.rand(shape, generator=generator) < 0.4,
        "all": torch.ones(shape, dtype=torch.bool),
        "diagonal": torch.zeros(shape, dtype=torch.bool),
    }[kind]
    diagonal = geometry.local(0) & geometry.visible
    if kind == "diagonal":
        # Not even the sink, where it is not on the diagonal itself.
        diagonal[:, 0] = geometry.first_positions + 1 < geometry.block_k
    return (chosen & geometry.visible) | diagonal


def step_lists(batch: Batch, keeps: list[torch.Tensor]) -> TileLists:
    """Lists of all requests' tiles in the order that the kernel goes through them."""
    longest = batch.blocks.max_k_blocks
    padded = [
        torch.nn.functional.pad(keep, (0, longest - keep.shape[-1]))
        for keep in batch.in_step_order(keeps)
    ]
    return build_tile_lists(torch.cat(padded, dim=1).to(batch.query.device))


def reference(
    problem: Problem,
    keep: torch.Tensor,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    output, _ = reference_attention(
        problem.query, problem.key, problem.value, keep, problem.geometry, SCALE,
        softcap=softcap, sinks=None if sinks is None else sinks.cpu(),
    )  # fmt: skip
    return output


def dense_error(problem: Problem, device: torch.device) -> float:
    """Error of PyTorch's dense attention on the same numbers in the same dtype: the budget."""
    geometry, dtype = problem.geometry, problem.query.dtype
    causal = torch.ones(geometry.q_len, geometry.kv_len, dtype=torch.bool).tril(geometry.first_row)
    output = torch.nn.functional.scaled_dot_product_attention(
        *(
            rows.to(device, dtype).transpose(0, 1)
            for rows in (problem.query, problem.key, problem.value)
        ),
        attn_mask=causal.to(device),
        scale=SCALE,
        enable_gqa=True,
    ).transpose(0, 1)
    everything = geometry.visible.expand(problem.query.shape[1], -1, -1)
    return relative_l1(output.cpu(), reference(problem, everything))


def check(
    batch: Batch,
    kind: str = "random",
    softcap: float = 0.0,
    prefill: SparsePrefill = triton_prefill,
) -> None:
    """Compares an implementation with the reference, request by request.

    The budget is relative to what PyTorch's dense attention loses in the same dtype.
    """
    device = batch.query.device
    keeps = [kept_blocks(problem, kind) for problem in batch.problems]
    lists = step_lists(batch, keeps)
    output = torch.full_like(batch.query, torch.nan, dtype=batch.step.matmul_dtype)
    prefill(batch.step, lists, output, SCALE, softcap)
    others = torch.ones(len(output), dtype=torch.bool)
    for request in batch.blocks.requests:
        index = request.table_row - 1
        problem = batch.problems[index]
        rows = slice(request.first_row, request.first_row + len(problem.query))
        expected = reference(problem, keeps[index], softcap, batch.sinks)
        error = relative_l1(output[rows].cpu(), expected)
        assert error <= 2 * dense_error(problem, device)
        others[rows] = False
    assert output.cpu()[others].isnan().all()


def api_prefill(
    step: StepInputs, lists: TileLists, output: torch.Tensor, softmax_scale: float,
    softcap: float,
) -> None:  # fmt: skip
    """The default implementation, through the door."""
    sparse_prefill(step, lists, output, softmax_scale, softcap=softcap)


def reference_prefill(
    step: StepInputs, lists: TileLists, output: torch.Tensor, softmax_scale: float,
    softcap: float,
) -> None:  # fmt: skip
    sparse_prefill(step, lists, output, softmax_scale, softcap=softcap, implementation="reference")


def tiles_prefill(
    step: StepInputs, lists: TileLists, output: torch.Tensor, softmax_scale: float,
    softcap: float,
) -> None:  # fmt: skip
    """Tiles of each request on a dense paged kernel, which caps nothing."""
    assert not softcap
    assert softmax_scale == SCALE
    num_kv_heads, head_dim = step.key_cache.shape[2:]
    dense = PagedDense(
        *(
            cache.transpose(1, 2).reshape(-1, step.page_size, head_dim)
            for cache in (step.key_cache, step.value_cache)
        )
    )
    block_lists = lists.block_lists.unflatten(0, (step.num_heads, -1))
    counts = lists.counts.view(step.num_heads, -1)
    for request, span, query, _, _ in step.each_request():
        # A step has a request's blocks from the last to the first.
        own = TileLists(
            block_lists[:, span].flip(1).flatten(0, 1), counts[:, span].flip(1).flatten()
        )
        pages = step.block_table[request.table_row]
        tables = build_tile_tables(own, request.geometry, pages, step.page_size, num_kv_heads)
        tile_prefill(query, output[request.rows], tables, dense)


NEEDS_INTERPRETER = pytest.mark.skipif(
    not INTERPRETED, reason="run in a process of its own, by the first test"
)
TRITON = pytest.param(api_prefill, id="interpreted-triton", marks=NEEDS_INTERPRETER)
TRITON_IN_PARTS = pytest.param(
    partial(triton_prefill, config=LaunchConfig(16, 4, 1)),
    id="interpreted-triton-in-parts",
    marks=NEEDS_INTERPRETER,
)


def in_pairs(
    step: StepInputs, lists: TileLists, output: torch.Tensor, softmax_scale: float,
    softcap: float,
) -> None:  # fmt: skip
    """Two key blocks at a time."""
    config = LaunchConfig(2 * step.blocks.block_k, 4, 1)
    triton_prefill(step, lists, output, softmax_scale, softcap, config)


TRITON_IN_PAIRS = pytest.param(in_pairs, id="interpreted-triton-in-pairs", marks=NEEDS_INTERPRETER)
REFERENCE = pytest.param(reference_prefill, id="reference")
TILES = pytest.param(tiles_prefill, id="tiles")


FEATURES = ["softcap", "sinks", "softcap sinks"]


def check_features(batch: Batch, names: str, prefill: SparsePrefill = triton_prefill) -> None:
    if "sinks" in names:
        batch.sinks = draw_sinks(batch.query.shape[1], batch.query.device.type)
    check(batch, "random", 4.0 if "softcap" in names else 0.0, prefill)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_this_module_passes_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("random", torch.float16),
        ("random", torch.float32),
        ("all", torch.float16),
        ("diagonal", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [
        (96, 96, 32, 32, 32, 16), (50, 131, 32, 32, 8, 24), (33, 100, 16, 32, 64, 32),
        (64, 200, 32, 16, 16, 16), (70, 150, 16, 16, 32, 24),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("prefill", [TRITON_IN_PARTS, TRITON_IN_PAIRS, REFERENCE])
def test_every_implementation_equals_the_reference(
    prefill: SparsePrefill,
    shape: tuple[int, int, int, int, int, int],
    kind: str,
    dtype: torch.dtype,
) -> None:
    check(one_request(*shape, dtype), kind, prefill=prefill)


@pytest.mark.parametrize("heads_outside", [False, True])
@pytest.mark.parametrize("prefill", [TRITON, REFERENCE, TILES])
def test_a_batch_leaves_other_rows_alone(
    prefill: SparsePrefill, heads_outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if heads_outside:
        # The other order of programs: one KV head's heads at a time.
        monkeypatch.setattr("vllm_afbs.kernels.impl.triton_prefill._L2_BYTES", 1)
    lengths = [(40, 40), (33, 100), (1, 70)]
    check(make_batch(lengths, 32, 16, 24, torch.float32, "cpu", heads_outside), prefill=prefill)


SHAPES = [(128, 128), (128, 64), (64, 128), (64, 64)]
"""Query and key blocks that are tuned and measured."""


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefill", [TRITON, TRITON_IN_PAIRS, REFERENCE])
def test_every_shape_equals_the_reference(
    prefill: SparsePrefill, shape: tuple[int, int], page_size: int
) -> None:
    """Pages may be larger than key blocks, and smaller."""
    block_q, block_k = shape
    lengths = [(200, 200), (130, 333), (1, 290)]
    batch = make_batch(lengths, block_q, page_size, 16, torch.float32, "cpu", block_k=block_k)
    check(batch, prefill=prefill)


@pytest.mark.parametrize("names", FEATURES)
@pytest.mark.parametrize("prefill", [TRITON, TRITON_IN_PARTS, TRITON_IN_PAIRS, REFERENCE])
def test_features_equal_the_reference(prefill: SparsePrefill, names: str) -> None:
    batch = make_batch([(70, 150), (33, 100)], 32, 16, 16, torch.float32, "cpu")
    check_features(batch, names, prefill)


@pytest.mark.parametrize(
    ("dtype", "with_query", "per_head", "names"),
    [
        (torch.float8_e4m3fn, False, False, ""),
        (torch.float8_e4m3fn, True, False, ""),
        (torch.float8_e4m3fn, True, True, "sinks softcap"),
        (torch.float8_e5m2, False, True, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("prefill", [TRITON_IN_PARTS, REFERENCE])
def test_fp8_is_read(
    prefill: SparsePrefill, dtype: torch.dtype, with_query: bool, per_head: bool, names: str
) -> None:
    batch = make_batch([(20, 20), (33, 70)], 32, 16, 24, torch.float32, "cpu")
    quantise(batch, dtype, with_query, per_head)
    check_features(batch, names, prefill)


@pytest.mark.parametrize("block_n", [24, 128])
def test_keys_that_are_no_part_and_no_pair_of_blocks_are_refused(block_n: int) -> None:
    batch = one_request(32, 32, 32, 32, 32, 16, torch.float32)
    lists = step_lists(batch, [kept_blocks(batch.problems[0], "all")])
    config = LaunchConfig(block_n, 4, 1)
    with pytest.raises(ValueError, match="block_n"):
        triton_prefill(batch.step, lists, torch.empty_like(batch.query), SCALE, 0.0, config)


@pytest.mark.parametrize("block_k", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("block_q", [16, 64, 128, 512])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_default_parts_make_up_a_block_or_two(head_dim: int, block_q: int, block_k: int) -> None:
    block_n = fastest_config(TileShape(head_dim, block_q, block_k)).block_n
    assert block_k % block_n == 0 or block_n == 2 * block_k


def test_measured_shapes_take_their_own_configuration() -> None:
    configs = read_configs()
    assert {TileShape(size, *shape) for size in (64, 128) for shape in SHAPES} <= configs.keys()
    for shape, config in configs.items():
        assert fastest_config(shape) == config


LENGTHS = [(640, 640), (300, 1000), (128, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_compiled_kernel_equals_the_reference(
    head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    check(make_batch(LENGTHS, 128, page_size, head_dim, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("prefill", [api_prefill, in_pairs])
@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_kernel_equals_the_reference_in_every_shape(
    shape: tuple[int, int], head_dim: int, page_size: int, prefill: SparsePrefill
) -> None:
    block_q, block_k = shape
    if prefill is in_pairs and block_k == 128:
        pytest.skip("256 keys at a time do not fit")
    for kind in ("random", "all", "diagonal"):
        batch = make_batch(
            LENGTHS, block_q, page_size, head_dim, torch.bfloat16, "cuda", block_k=block_k
        )
        check(batch, kind, prefill=prefill)


@pytest.mark.gpu
@pytest.mark.parametrize("names", FEATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_features_equal_the_reference_in_every_shape(
    shape: tuple[int, int], names: str
) -> None:
    batch = make_batch(LENGTHS, shape[0], 64, 128, torch.bfloat16, "cuda", block_k=shape[1])
    check_features(batch, names)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_outside", [False, True])
@pytest.mark.parametrize("kind", ["all", "diagonal"])
def test_compiled_kernel_takes_any_lists_and_layout(kind: str, heads_outside: bool) -> None:
    check(make_batch(LENGTHS, 128, 32, 128, torch.bfloat16, "cuda", heads_outside), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("names", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_compiled_features_equal_the_reference(
    head_dim: int, dtype: torch.dtype, names: str
) -> None:
    batch = make_batch(LENGTHS, 128, 16, head_dim, dtype, "cuda")
    check_features(batch, names)


@pytest.mark.gpu
@pytest.mark.parametrize("with_query", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_compiled_kernel_reads_fp8(
    head_dim: int, page_size: int, dtype: torch.dtype, with_query: bool
) -> None:
    batch = make_batch(LENGTHS, 128, page_size, head_dim, torch.bfloat16, "cuda")
    quantise(batch, dtype, with_query, per_head=with_query)
    check(batch)
