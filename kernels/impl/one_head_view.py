"""A paged cache seen with one KV head, so that one launch of a dense kernel serves all heads."""

import torch


def heads_per_page(cache: torch.Tensor) -> int:
    """Pages of ``one_head_view`` from one page of a cache to the next.

    Where heads lie outside the tokens of a page (HND) that is ``num_kv_heads``. Where they lie
    inside (NHD), pages of the view overlap in memory, and most of its page numbers are never used.
    """
    return cache.stride(0) // _head_stride(cache)


def _head_stride(cache: torch.Tensor) -> int:
    # PyTorch allows any stride for a dimension of one; tensor copies do not.
    return cache.stride(2) if cache.shape[2] > 1 else cache.stride(0)


def one_head_view(cache: torch.Tensor) -> torch.Tensor:
    """Views a paged cache as one with a single KV head, without a copy.

    Page ``page * heads_per_page(cache) + kv_head`` of the view is KV head ``kv_head`` of page
    ``page``.

    Args:
        cache: ``[num_pages, page_size, num_kv_heads, head_dim]``.

    Returns:
        ``[num_pages * heads_per_page(cache) or less, page_size, 1, head_dim]``, the same memory.

    Raises:
        ValueError: A page is not a whole number of heads' strides long.
    """
    num_pages, page_size, num_kv_heads, head_dim = cache.shape
    stride_page, stride_token, _, stride_column = cache.stride()
    stride_head = _head_stride(cache)
    if stride_page % stride_head:
        raise ValueError(
            f"the cache's page stride must be a multiple of its head stride, got {cache.stride()}"
        )
    return cache.as_strided(
        ((num_pages - 1) * (stride_page // stride_head) + num_kv_heads, page_size, 1, head_dim),
        (stride_head, stride_token, stride_token, stride_column),
    )
