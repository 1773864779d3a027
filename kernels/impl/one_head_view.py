"""A paged cache seen with one KV head, so that one launch of a dense kernel serves all heads."""

import math
from typing import NamedTuple

import torch


class ViewSteps(NamedTuple):
    """How far apart things are in ``one_head_view``, in its pages.

    Attributes:
        page: From a page of the cache to the next.
        head: From a KV head to the next.
        part: From a part of a page to the next.
    """

    page: int
    head: int
    part: int


def view_steps(cache: torch.Tensor, part_size: int) -> ViewSteps:
    """Where ``one_head_view`` has the parts of a cache's pages.

    Where heads lie outside the tokens of a page (HND), its pages follow each other in memory. Where
    they lie inside (NHD), they overlap, and most of the view's page numbers are never used.

    Args:
        cache: As there.
        part_size: As there.

    Raises:
        ValueError: As there.
    """
    page_size, stride_page = cache.shape[1], cache.stride(0)
    # PyTorch allows any stride for a dimension of one; tensor copies do not.
    stride_head = cache.stride(2) if cache.shape[2] > 1 else stride_page
    stride_part = part_size * cache.stride(1)
    if page_size % part_size:
        raise ValueError(f"part_size must divide page_size {page_size}, got {part_size}")
    unit = math.gcd(stride_head, stride_part) if part_size < page_size else stride_head
    if stride_page % unit:
        raise ValueError(
            "the cache's page stride must be a multiple of its head stride (and that of a part of "
            f"a page), got {cache.stride()}"
        )
    return ViewSteps(stride_page // unit, stride_head // unit, stride_part // unit)


def one_head_view(cache: torch.Tensor, part_size: int) -> torch.Tensor:
    """Views a paged cache as one with a single KV head and perhaps shorter pages, without a copy.

    Page ``page * steps.page + kv_head * steps.head + part * steps.part`` of the view, with the
    cache's ``view_steps``, holds the part's keys of KV head ``kv_head`` on page ``page``.

    Args:
        cache: ``[num_pages, page_size, num_kv_heads, head_dim]``.
        part_size: Keys of a page of the view; divides ``page_size``.

    Returns:
        ``[num_view_pages, part_size, 1, head_dim]``, the same memory.

    Raises:
        ValueError: Pages, heads and parts are no multiples of one stride.
    """
    num_pages, page_size, num_kv_heads, head_dim = cache.shape
    stride_page, stride_token, _, stride_column = cache.stride()
    steps = view_steps(cache, part_size)
    last = ViewSteps(num_pages - 1, num_kv_heads - 1, page_size // part_size - 1)
    last_page = sum(step * index for step, index in zip(steps, last, strict=True))
    return cache.as_strided(
        (last_page + 1, part_size, 1, head_dim),
        (stride_page // steps.page, stride_token, stride_token, stride_column),
    )
