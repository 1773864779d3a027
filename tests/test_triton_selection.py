"""The device selector and table builder: compiled on a GPU, interpreted without."""

import pytest
import torch

from tests.interpreted import INTERPRETED, assert_passes_interpreted, paged
from tests.problems import SCALE, Problem, make_problem
from vllm_afbs.kernels import HeadThresholds, TileLists, build_tile_tables
from vllm_afbs.kernels.reference import reference_select
from vllm_afbs.kernels.triton_selection import (
    pool_key_pages,
    pool_query_blocks,
    select_tile_lists,
)
from vllm_afbs.kernels.triton_tables import build_tile_tables_on_device


def check(
    q_len: int, kv_len: int, block: int, page_size: int, head_dim: int, dtype: torch.dtype,
    tau: float | None, device: str,
) -> None:  # fmt: skip
    problem = make_problem(q_len, kv_len, block, block, 2, 3, head_dim, page_size)
    query, key = problem.query.to(device, dtype), problem.key.to(device, dtype)
    thresholds = problem.thresholds
    if tau is not None:
        thresholds = HeadThresholds(torch.full((6,), tau), thresholds.theta)
    pages = problem.pages.to(device, torch.int32)
    lists = select_tile_lists(
        pool_query_blocks(query, problem.geometry),
        pool_key_pages(paged(key, pages, page_size), pages, problem.geometry),
        HeadThresholds(thresholds.tau.to(device), thresholds.theta.to(device)),
        problem.geometry,
        SCALE,
    )
    expected = reference_select(query.cpu(), key.cpu(), thresholds, problem.geometry, SCALE)
    check_tables(lists, problem, pages, page_size)
    expected = expected.flatten(0, 1)
    assert torch.equal(lists.counts.cpu(), expected.sum(-1, dtype=torch.int32))
    for tile, count in enumerate(lists.counts.tolist()):
        kept = expected[tile].nonzero().flatten()
        assert torch.equal(lists.block_lists[tile, :count].cpu().long(), kept)


def check_tables(lists: TileLists, problem: Problem, pages: torch.Tensor, page_size: int) -> None:
    if problem.geometry.block_k % page_size:
        return
    arguments = (lists, problem.geometry, pages, page_size, problem.num_kv_heads)
    built = build_tile_tables_on_device(*arguments)
    lists.block_lists.clamp_(0, problem.geometry.num_k_blocks - 1)  # the tails are undefined
    expected = build_tile_tables(*arguments)
    assert torch.equal(built.query_start_loc, expected.query_start_loc)
    assert torch.equal(built.seq_lens, expected.seq_lens)
    assert torch.equal(built.block_table, expected.block_table)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_this_module_passes_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


SHAPES = [(96, 96, 32, 32, 16), (50, 131, 32, 8, 24), (33, 300, 16, 64, 32)]


@pytest.mark.skipif(not INTERPRETED, reason="run in a process of its own, by the test above")
@pytest.mark.parametrize("tau", [None, 1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_selector_equals_the_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, tau: float | None
) -> None:
    check(*shape, dtype, tau, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("tau", [None, 1.0, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "page_size"), [(640, 640, 128), (300, 1000, 16), (513, 2049, 64)], ids=str
)
def test_compiled_selector_equals_the_reference(
    q_len: int, kv_len: int, page_size: int, head_dim: int, dtype: torch.dtype, tau: float | None
) -> None:
    check(q_len, kv_len, 128, page_size, head_dim, dtype, tau, "cuda")
