"""vLLM's KV cache on CUDA as our kernels see it, and whether they can."""

import functools
from typing import Any

import torch

from vllm_afbs.backends.cuda.pages import are_readable
from vllm_afbs.kernels import QueryBlocks, StepInputs, one_head_view

_MOST_PAGES = 2**31 - 1  # block tables hold 32-bit numbers


FP8_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
"""The FP8 numbers in a cache, by vLLM's name for its type. FlashAttention reads no others."""


def step_inputs(
    impl: Any,
    layer: Any,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    blocks: QueryBlocks,
) -> StepInputs:
    """What the kernels read in a layer's step, without a copy.

    Sinks and scales are looked up in every step: vLLM fills them after it has made the layer.

    Args:
        impl: vLLM's implementation of the layer.
        layer: vLLM's layer.
        query: The step's queries, ``[num_tokens, num_heads, head_dim]``.
        kv_cache: The cache as vLLM passes it to ``forward``; see ``is_readable``.
        block_table: The pages of each request.
        blocks: The query blocks of the long prefills.
    """
    dtype = FP8_DTYPES.get(impl.kv_cache_dtype)
    caches = _split(_typed(kv_cache, dtype), impl.head_size)
    scales = None if dtype is None else _scales(layer, query, impl.num_kv_heads)
    return StepInputs(query, *caches, block_table, blocks, impl.sinks, scales)


def _typed(kv_cache: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    # vLLM keeps FP8 as bytes.
    return kv_cache if dtype is None else kv_cache.view(dtype)


def _split(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of ``[num_pages, num_kv_heads, page_size, 2 * head_dim]``.

    Twice ``[num_pages, page_size, num_kv_heads, head_dim]``.
    """
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_dim, dim=-1)
    return key_cache, value_cache


def _scales(layer: Any, query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """See ``StepInputs.scales``; a layer's are one number each, or one for each KV head."""
    of_query = layer._q_scale
    if query.dtype not in FP8_DTYPES.values():
        # vLLM quantises no queries for kernels that could not take them.
        of_query = torch.ones_like(of_query)
    scales = (of_query, layer._k_scale, layer._v_scale)
    return torch.stack([scale.expand(num_kv_heads) for scale in scales])


def is_readable(impl: Any, kv_cache: torch.Tensor, query: torch.Tensor, block_k: int) -> bool:
    """Whether our kernels can read a layer's cache.

    vLLM places pages, heads and tokens in memory in the order that ``VLLM_KV_CACHE_LAYOUT``, a KV
    connector or another backend of the model asks for, and may pad pages. Our kernels read every
    order in which a page is a whole number of heads apart from the next; see ``one_head_view``.

    Args:
        impl: vLLM's implementation of the layer.
        kv_cache: The cache as vLLM passes it to ``forward``.
        query: The step's queries.
        block_k: Keys per key block.
    """
    expected = torch.uint8 if impl.kv_cache_dtype in FP8_DTYPES else query.dtype
    return kv_cache.dtype == expected and _is_readable(
        tuple(kv_cache.shape), kv_cache.stride(), impl.num_kv_heads, impl.head_size, block_k
    )


@functools.lru_cache(maxsize=64)
def _is_readable(
    shape: tuple[int, ...], stride: tuple[int, ...], num_kv_heads: int, head_dim: int, block_k: int
) -> bool:
    if len(shape) != 4 or (shape[1], shape[3]) != (num_kv_heads, 2 * head_dim):
        return False
    if stride[3] != 1 or not are_readable(shape[2], block_k):
        return False
    # All that follows depends on sizes and strides only.
    kv_cache = torch.empty_strided(shape, stride, device="meta")
    for cache in _split(kv_cache, head_dim):
        try:
            num_pages = len(one_head_view(cache, min(shape[2], block_k)))
        except ValueError:
            return False
        if not 0 < num_pages <= _MOST_PAGES:
            return False
    return True
