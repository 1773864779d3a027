"""The Triton kernel against the fp64 reference: on a GPU, and in Triton's interpreter without."""

import pytest
import torch

from tests.interpreted import INTERPRETED, assert_passes_interpreted, paged
from tests.problems import SCALE, Problem, make_problem, relative_l1
from vllm_afbs.kernels.reference import reference_attention
from vllm_afbs.kernels.tiles import build_tile_lists
from vllm_afbs.kernels.triton_prefill import triton_prefill


def dense_error(problem: Problem) -> float:
    """Error of PyTorch's dense attention on the same numbers in the same dtype: the budget."""
    geometry = problem.geometry
    causal = torch.ones(geometry.q_len, geometry.kv_len, dtype=torch.bool).tril(geometry.first_row)
    output = torch.nn.functional.scaled_dot_product_attention(
        *(rows.transpose(0, 1) for rows in (problem.query, problem.key, problem.value)),
        attn_mask=causal.to(problem.query.device),
        scale=SCALE,
        enable_gqa=True,
    ).transpose(0, 1)
    everything = geometry.visible.expand(problem.query.shape[1], -1, -1)
    return relative_l1(output.cpu(), reference(problem, everything))


def reference(problem: Problem, keep: torch.Tensor) -> torch.Tensor:
    query, key, value = (rows.cpu() for rows in (problem.query, problem.key, problem.value))
    return reference_attention(query, key, value, keep.cpu(), problem.geometry, SCALE)[0]


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
    diagonal = geometry.always.clone()
    if kind == "diagonal":
        # Not even the sink, where it is not on the diagonal itself.
        diagonal[:, 0] = geometry.first_positions + 1 < geometry.block_k
    return (chosen & geometry.visible) | diagonal


def check(
    problem: Problem, page_size: int, dtype: torch.dtype, kind: str, device: str, block_n: int
) -> None:
    problem.query, problem.key, problem.value = (
        rows.to(device, dtype) for rows in (problem.query, problem.key, problem.value)
    )
    keep = kept_blocks(problem, kind).to(device)
    pages = problem.pages.to(device, torch.int32)
    output = torch.full_like(problem.query, torch.nan)
    triton_prefill(
        problem.query,
        paged(problem.key, pages, page_size),
        paged(problem.value, pages, page_size),
        output,
        pages,
        build_tile_lists(keep),
        problem.geometry,
        SCALE,
        block_n=block_n,
    )
    assert relative_l1(output.cpu(), reference(problem, keep)) <= 2 * dense_error(problem)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_this_module_passes_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="run in a process of its own, by the test above")
@pytest.mark.parametrize("kind", ["random", "all", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "block_q", "block_k", "page_size", "head_dim"),
    [(96, 96, 32, 32, 32, 16), (50, 131, 32, 32, 8, 24), (33, 100, 16, 32, 64, 32)],
    ids=str,
)
def test_interpreted_kernel_equals_the_reference(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    kind: str,
) -> None:
    problem = make_problem(q_len, kv_len, block_q, block_k, 2, 2, head_dim, page_size)
    check(problem, page_size, dtype, kind, "cpu", block_n=16)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "all", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("q_len", "kv_len"), [(640, 640), (300, 1000)], ids=str)
def test_compiled_kernel_equals_the_reference(
    q_len: int, kv_len: int, head_dim: int, page_size: int, dtype: torch.dtype, kind: str
) -> None:
    problem = make_problem(q_len, kv_len, 128, 128, 2, 3, head_dim, page_size)
    check(problem, page_size, dtype, kind, "cuda", block_n=64 if head_dim < 256 else 32)
