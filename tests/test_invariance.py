"""What a prompt's sparse attention must not depend on, on vLLM's CPU kernels.

The oracle is one fp64 computation of the whole prompt. A step may hold any part of it that begins
and ends between blocks, over pages of any size, in any place of a batch, with earlier parts
computed or found in the prefix cache: its rows are the oracle's, as far as the same kernel comes to
the oracle when it computes all blocks.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.platforms import current_platform

from tests.batches import GAP
from tests.cpu_problems import HEAD_DIM, fill_cache
from tests.problems import SCALE, Problem, make_problem, relative_l1
from vllm_afbs.backends.cpu.sparse import CacheFormat, SparsePrefill, dense_paged_attention
from vllm_afbs.kernels import BlockGeometry, HeadThresholds, TileTables
from vllm_afbs.kernels.query_blocks import PrefillRequest
from vllm_afbs.kernels.reference import reference_attention, reference_select

NUM_HEADS, NUM_KV_HEADS = 6, 2
UNWRITTEN = 7.0


@pytest.fixture(scope="module", autouse=True)
def _kernels() -> None:
    current_platform.import_kernels()


@dataclass
class Served:
    """Prompts over one cache, and where the steps' chunks of each end.

    Attributes:
        problems: Whole prompts, each with one chunk of all its rows.
        edges: By prompt: where its first chunk begins (what is before was in the prefix cache),
            and where each chunk ends.
        orders: By step: in which order the prompts' chunks lie in the batch.
        page_size: Keys of a page.
        dtype: Of queries and cache.
    """

    problems: list[Problem]
    edges: list[list[int]]
    orders: list[list[int]]
    page_size: int
    dtype: torch.dtype

    @property
    def cache_format(self) -> CacheFormat:
        return CacheFormat("vec", self.page_size, self.dtype)


@st.composite
def served(draw: st.DrawFn, dtype: torch.dtype) -> Served:
    block_q, block_k = draw(st.sampled_from([(64, 64), (64, 128), (128, 64)]))
    page_size = draw(st.sampled_from([size for size in (32, 64, 128) if block_k % size == 0]))
    stride = 128  # blocks of 64 rows are scored in pairs
    problems, edges = [], []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(stride, 5 * stride + 63))
        problem = make_problem(
            length, length, block_q, block_k, NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM,
            page_size, draw(st.integers(0, 2**16)),
        )  # fmt: skip
        problem.query, problem.key, problem.value = (
            rows.to(dtype) for rows in (problem.query, problem.key, problem.value)
        )
        inner = draw(st.sets(st.sampled_from(range(stride, 5 * stride + 1, stride))))
        cuts = [0, *sorted(edge for edge in inner if edge < length), length]
        problems.append(problem)
        edges.append(cuts[draw(st.integers(0, len(cuts) - 2)) :])
    num_steps = max(map(len, edges)) - 1
    orders = [draw(st.permutations(range(len(problems)))) for _ in range(num_steps)]
    return Served(problems, edges, orders, page_size, dtype)


def run(case: Served, thresholds: HeadThresholds) -> list[torch.Tensor]:
    """Each prompt's output from its first edge on, computed step by step."""
    caches = [fill_cache(problem, case.cache_format) for problem in case.problems]
    starts = [sum(len(cache) for cache in caches[:i]) for i in range(len(caches))]
    # The kernel may read a partial page's free slots before it masks them.
    cache = torch.cat(caches).nan_to_num_(0.0)
    sparse = SparsePrefill(thresholds, NUM_KV_HEADS, HEAD_DIM, SCALE, case.cache_format)
    parts: list[list[torch.Tensor]] = [[] for _ in case.problems]
    for step, order in enumerate(case.orders):
        rows, queries, requests = 0, [], []
        for i in order:
            if step + 1 >= len(case.edges[i]):
                continue
            problem = case.problems[i]
            start, stop = case.edges[i][step : step + 2]
            whole = problem.geometry
            chunk = BlockGeometry(stop - start, stop, whole.block_q, whole.block_k)
            requests.append((i, PrefillRequest(rows + GAP, i, chunk)))
            queries += [torch.full((GAP, NUM_HEADS, HEAD_DIM), torch.nan).to(case.dtype)]
            queries += [problem.query[start:stop]]
            rows += GAP + stop - start
        query = torch.cat(queries)
        output = torch.full_like(query, UNWRITTEN)
        written = torch.zeros(len(query), dtype=torch.bool)
        for i, request in requests:
            pages = (case.problems[i].pages + starts[i]).to(torch.int32)
            keep = sparse.select(query, cache, request, pages)
            tables = sparse.tables(keep, request, pages)
            sparse.attend(query, output, cache, request, tables)
            parts[i].append(output[request.rows])
            written[request.rows] = True
        assert (output[~written] == UNWRITTEN).all()  # other requests' rows
    return [torch.cat(each) for each in parts]


def reference(problem: Problem, keep: torch.Tensor) -> torch.Tensor:
    arguments = problem.query, problem.key, problem.value, keep, problem.geometry, SCALE
    return reference_attention(*arguments)[0]


def dense(problem: Problem, cache_format: CacheFormat) -> torch.Tensor:
    """VLLM's kernel on the whole prompt as one sequence."""
    cache = fill_cache(problem, cache_format).nan_to_num_(0.0)
    length = problem.geometry.kv_len
    tables = TileTables(
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_table=problem.pages[None].to(torch.int32),
    )
    output = torch.empty_like(problem.query)
    dense_paged_attention(problem.query, output, cache, tables, SCALE, cache_format)
    return output


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_prompt_is_attended_to_alike_however_it_is_served(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    case = data.draw(served(dtype))
    thresholds = case.problems[0].thresholds
    for problem, edges, output in zip(
        case.problems, case.edges, run(case, thresholds), strict=True
    ):
        keep = reference_select(problem.query, problem.key, thresholds, problem.geometry, SCALE)
        everything = problem.geometry.visible.expand(NUM_HEADS, -1, -1)
        budget = relative_l1(dense(problem, case.cache_format), reference(problem, everything))
        # Dropping blocks must not cost precision: dense in the same dtype is the budget.
        assert relative_l1(output, reference(problem, keep)[edges[0] :]) <= 2 * budget


@DTYPES
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_with_tau_one_a_prompt_gets_dense_attention(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    case = data.draw(served(dtype))
    everything = HeadThresholds(torch.ones(NUM_HEADS), torch.full((NUM_HEADS,), -1.0))
    for problem, edges, output in zip(
        case.problems, case.edges, run(case, everything), strict=True
    ):
        expected = dense(problem, case.cache_format)[edges[0] :].double()
        # Two roundings of one exact result.
        assert relative_l1(output, expected) <= 4 * torch.finfo(dtype).eps
