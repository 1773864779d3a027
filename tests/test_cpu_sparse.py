"""The CPU backend's pieces on vLLM's real kernels, against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from tests.batches import draw_sinks
from tests.cpu_problems import HEAD_DIM, fill_cache
from tests.problems import SCALE, Problem, make_problem, relative_l1
from vllm_afbs.backends.cpu.key_pages import KeyPageReader
from vllm_afbs.backends.cpu.sparse import CacheFormat, SparsePrefill
from vllm_afbs.kernels.query_blocks import PrefillRequest
from vllm_afbs.kernels.reference import reference_attention, reference_select


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    current_platform.import_kernels()


def case(
    q_len: int, kv_len: int, page_size: int, dtype: torch.dtype, isa: str, softcap: float = 0.0
) -> tuple[Problem, CacheFormat, SparsePrefill, PrefillRequest]:
    problem = make_problem(q_len, kv_len, 128, 128, 2, 3, HEAD_DIM, page_size)
    problem.query, problem.key, problem.value = (
        rows.to(dtype) for rows in (problem.query, problem.key, problem.value)
    )
    cache_format = CacheFormat(isa, page_size, dtype)
    sparse = SparsePrefill(problem.thresholds, 2, HEAD_DIM, SCALE, cache_format, softcap)
    request = PrefillRequest(0, 0, problem.geometry)
    return problem, cache_format, sparse, request


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_keys_read_back_as_written(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    reader = KeyPageReader(isa, 32, head_dim, dtype)
    key = torch.randn(96, 3, head_dim).to(dtype)
    cache = torch.zeros(6, 3, 64, head_dim, dtype=dtype)
    pages = torch.tensor([4, 2, 5])
    slots = (pages[:, None] * 32 + torch.arange(32)).flatten()
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, key, key_cache, value_cache, slots, isa)
    assert torch.equal(reader.read(key_cache, pages).flatten(1, 2).transpose(0, 1), key)


@pytest.mark.parametrize("isa", ["vec", "vec16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "page_size"),
    [(640, 640, 128), (300, 1000, 128), (513, 1025, 64), (130, 700, 32)],
    ids=lambda value: str(value),
)
def test_sparse_prefill_equals_the_reference(
    q_len: int, kv_len: int, page_size: int, dtype: torch.dtype, isa: str
) -> None:
    problem, cache_format, sparse, request = case(q_len, kv_len, page_size, dtype, isa)
    cache = fill_cache(problem, cache_format)
    pages = problem.pages.to(torch.int32)
    keep = sparse.select(problem.query, cache, request, pages)
    assert torch.equal(
        keep,
        reference_select(problem.query, problem.key, problem.thresholds, problem.geometry, SCALE),
    )
    check_attention(problem, cache, sparse, request, keep)


def check_attention(
    problem: Problem,
    cache: torch.Tensor,
    sparse: SparsePrefill,
    request: PrefillRequest,
    keep: torch.Tensor,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Compares attention to all blocks and to the kept ones with the reference."""
    pages, dtype = problem.pages.to(torch.int32), problem.query.dtype
    # The kernel may read a partial page's free slots before it masks them.
    cache.nan_to_num_(0.0)
    everything = problem.geometry.visible.expand(6, -1, -1)
    errors = []
    for blocks in (everything, keep):
        output = torch.empty_like(problem.query)
        tables = sparse.tables(blocks, request, pages)
        sparse.attend(problem.query, output, cache, request, tables, sinks)
        expected, _ = reference_attention(
            problem.query, problem.key, problem.value, blocks, problem.geometry, SCALE,
            softcap=softcap, sinks=sinks,
        )  # fmt: skip
        errors.append(relative_l1(output, expected))
    dense_error, sparse_error = errors
    assert dense_error <= 8 * torch.finfo(dtype).eps
    # Dropping blocks must not cost precision: the same operation in the same dtype is the budget.
    assert sparse_error <= 2 * dense_error


@settings(max_examples=20, deadline=None)
@given(
    q_len=st.integers(1, 400),
    before=st.integers(0, 400),
    page_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    softcap=st.sampled_from([0.0, 5.0]),
    has_sinks=st.booleans(),
)
def test_sinks_and_softcap_equal_the_reference(
    q_len: int, before: int, page_size: int, dtype: torch.dtype, softcap: float, has_sinks: bool
) -> None:
    problem, cache_format, sparse, request = case(
        q_len, before + q_len, page_size, dtype, "vec", softcap
    )
    cache = fill_cache(problem, cache_format)
    keep = sparse.select(problem.query, cache, request, problem.pages.to(torch.int32))
    sinks = draw_sinks(6, "cpu") if has_sinks else None
    check_attention(problem, cache, sparse, request, keep, softcap, sinks)
