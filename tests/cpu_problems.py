"""Problems in vLLM's own CPU cache."""

import torch
from vllm import _custom_ops as ops

from tests.problems import Problem
from vllm_afbs.backends.cpu.sparse import CacheFormat, split_cache

HEAD_DIM = 64


def fill_cache(problem: Problem, cache_format: CacheFormat) -> torch.Tensor:
    """Writes the problem's K and V through vLLM's own operation; free slots hold NaN."""
    num_pages = int(problem.pages.max()) + 1
    shape = (num_pages, problem.num_kv_heads, cache_format.page_size, 2 * HEAD_DIM)
    cache = torch.full(shape, torch.nan, dtype=cache_format.dtype)
    positions = torch.arange(problem.geometry.kv_len)
    slots = problem.pages[positions // cache_format.page_size] * cache_format.page_size
    slots += positions % cache_format.page_size
    ops.cpu_attn_reshape_and_cache(
        problem.key, problem.value, *split_cache(cache), slots, cache_format.isa
    )
    return cache
