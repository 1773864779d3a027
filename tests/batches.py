"""A step of several requests over one paged cache."""

from dataclasses import dataclass

import torch

from tests.interpreted import paged
from tests.problems import Problem, make_problem
from vllm_afbs.kernels import PrefillRequest, QueryBlocks, StepInputs, cut_query_blocks

GAP = 5
"""Rows of other requests before each one."""


def draw_sinks(num_heads: int, device: str) -> torch.Tensor:
    """Sinks from one that hardly counts to one that takes nearly all, in bf16 as models have."""
    return torch.linspace(-4.0, 12.0, num_heads, device=device).bfloat16()


@dataclass
class Batch:
    """The step's tensors; ``problems`` hold each request's own, in the step's order."""

    problems: list[Problem]
    blocks: QueryBlocks
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    sinks: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    @property
    def step(self) -> StepInputs:
        """The tensors as kernels take them; made anew, as tests change them."""
        return StepInputs(
            self.query, self.key_cache, self.value_cache, self.block_table, self.blocks,
            self.sinks, self.scales,
        )  # fmt: skip

    def in_step_order(self, per_request: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each request's ``[num_heads, num_q_blocks, ...]``, as the kernels go through them."""
        return [per_request[r.table_row - 1].flip(1) for r in self.blocks.requests]


def quantise(batch: Batch, dtype: torch.dtype, with_query: bool, per_head: bool) -> None:
    """Puts a batch into FP8, and what that leaves of its numbers into the problems.

    There, keys carry the queries' scales, so that queries stay what a matrix unit gets: their FP8
    numbers in fp16.

    Args:
        batch: The batch.
        dtype: An FP8 dtype.
        with_query: Whether queries are in FP8, too.
        per_head: Whether KV heads have scales of their own.
    """
    device, num_kv_heads = batch.query.device, batch.key_cache.shape[2]
    scales = torch.tensor([0.05, 0.03, 0.07])[:, None]
    scales = scales * torch.linspace(1.0, 2.0 if per_head else 1.0, num_kv_heads)
    if not with_query:
        scales[0] = 1.0
    group = batch.query.shape[1] // num_kv_heads
    of_query = scales[0].repeat_interleave(group)[:, None]
    of_key, of_value = scales[1, :, None], scales[2, :, None]
    batch.key_cache, batch.value_cache = (
        (cache.cpu().float() / scale).to(dtype).to(device)
        for cache, scale in ((batch.key_cache, of_key), (batch.value_cache, of_value))
    )
    if with_query:
        batch.query = (batch.query.cpu().float() / of_query).to(dtype).to(device)
    for problem in batch.problems:
        if with_query:
            problem.query = (problem.query.float() / of_query).to(dtype).half()
        key, value = (
            (rows.float() / scale).to(dtype).double() * scale.double()
            for rows, scale in ((problem.key, of_key), (problem.value, of_value))
        )
        problem.key, problem.value = key * scales[0, :, None].double(), value
    batch.scales = scales.to(device)


def make_batch(
    lengths: list[tuple[int, int]],
    block: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    heads_outside: bool = False,
    block_k: int | None = None,
) -> Batch:
    """Draws requests of these ``(q_len, kv_len)``, their pages mixed and their rows apart.

    Args:
        lengths: Of the requests.
        block: Rows of a query block, and keys of a key block unless ``block_k`` says otherwise.
        page_size: Keys of a page.
        head_dim: Size of a head.
        dtype: Of queries and cache.
        device: Where the tensors lie.
        heads_outside: Whether a page holds head by head (HND) rather than token by token (NHD).
        block_k: Keys of a key block.
    """
    problems = [
        make_problem(q_len, kv_len, block, block_k or block, 2, 3, head_dim, page_size, seed=seed)
        for seed, (q_len, kv_len) in enumerate(lengths)
    ]
    queries, requests, key_pages, value_pages, rows, first_page = [], [], [], [], 0, 0
    # Row 0 of the block table is another request's.
    block_table = torch.zeros(len(lengths) + 1, 159, dtype=torch.int32)  # rows begin anywhere
    for index, problem in enumerate(problems):
        problem.query, problem.key, problem.value = (
            part.to(dtype) for part in (problem.query, problem.key, problem.value)
        )
        queries += [torch.full((GAP, *problem.query.shape[1:]), torch.nan).to(dtype)]
        queries += [problem.query]
        requests.append(PrefillRequest(rows + GAP, index + 1, problem.geometry))
        rows += GAP + len(problem.query)
        key_pages.append(paged(problem.key, problem.pages, page_size))
        value_pages.append(paged(problem.value, problem.pages, page_size))
        block_table[index + 1, : len(problem.pages)] = problem.pages + first_page
        first_page += len(key_pages[-1])
    caches = [torch.cat(pages).to(device) for pages in (key_pages, value_pages)]
    if heads_outside:
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    blocks = cut_query_blocks(requests, torch.device(device))
    query = torch.cat(queries).to(device)
    return Batch(problems, blocks, query, caches[0], caches[1], block_table.to(device))
