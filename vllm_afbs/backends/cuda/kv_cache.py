"""vLLM's KV cache on CUDA as our kernels see it, and whether they can."""

import functools

import torch

from vllm_afbs.kernels import one_head_view

_MOST_PAGES = 2**31 - 1  # block tables hold 32-bit numbers


def split_kv_cache(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer's cache, without a copy.

    Args:
        kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_dim]``.
        head_dim: Size of a head.

    Returns:
        Twice ``[num_pages, page_size, num_kv_heads, head_dim]``.
    """
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_dim, dim=-1)
    return key_cache, value_cache


def is_readable(
    kv_cache: torch.Tensor, query: torch.Tensor, num_kv_heads: int, block_k: int
) -> bool:
    """Whether our kernels can read a layer's cache.

    vLLM places pages, heads and tokens in memory in the order that ``VLLM_KV_CACHE_LAYOUT``, a KV
    connector or another backend of the model asks for, and may pad pages. Our kernels read every
    order in which a page is a whole number of heads apart from the next; see ``one_head_view``.

    Args:
        kv_cache: The cache as vLLM passes it to ``forward``.
        query: The step's queries, ``[num_tokens, num_heads, head_dim]``.
        num_kv_heads: KV heads of this rank.
        block_k: Keys per key block.
    """
    return kv_cache.dtype == query.dtype and _is_readable(
        tuple(kv_cache.shape), kv_cache.stride(), num_kv_heads, query.shape[-1], block_k
    )


@functools.lru_cache(maxsize=64)
def _is_readable(
    shape: tuple[int, ...], stride: tuple[int, ...], num_kv_heads: int, head_dim: int, block_k: int
) -> bool:
    if len(shape) != 4 or (shape[1], shape[3]) != (num_kv_heads, 2 * head_dim):
        return False
    if stride[3] != 1 or block_k % shape[2]:
        return False
    # All that follows depends on sizes and strides only.
    kv_cache = torch.empty_strided(shape, stride, device="meta")
    for cache in split_kv_cache(kv_cache, head_dim):
        try:
            num_pages = len(one_head_view(cache))
        except ValueError:
            return False
        if not 0 < num_pages <= _MOST_PAGES:
            return False
    return True
