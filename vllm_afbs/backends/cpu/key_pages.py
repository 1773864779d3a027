"""Reads keys from vLLM's CPU cache, however its kernels pack them."""

import functools

import torch
from vllm import _custom_ops as ops


class UnknownPackingError(RuntimeError):
    """vLLM's kernels store a page of K in a way that ``KeyPageReader`` cannot undo."""


class KeyPageReader:
    """Unpacks pages of K.

    The kernels of each instruction set pack a page of K in their own order: transposed for ``vec``,
    in pairs for AMX, and so on. The reader does not know these orders. It writes a page of known
    numbers with vLLM's own cache operation once, and looks where each number went.
    """

    def __init__(self, isa: str, page_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """Finds out the order of the packing.

        Args:
            isa: vLLM's name for the kernels in use.
            page_size: Keys per page.
            head_dim: Size of a head.
            dtype: The cache's dtype: fp32, fp16 or bf16.

        Raises:
            UnknownPackingError: The kernel does not store K as a permutation of a page.
        """
        self._shape = (page_size, head_dim)
        size = page_size * head_dim
        # bf16 holds integers exactly only up to 256, so each index is written as two digits.
        digits = torch.arange(size).view(self._shape)
        low, high = (self._packed(isa, digit.to(dtype)) for digit in (digits % 256, digits // 256))
        element_at = high * 256 + low
        self._place_of = torch.empty(size, dtype=torch.int64)
        if not torch.equal(element_at.sort().values, torch.arange(size)):
            raise UnknownPackingError(
                f"the {isa!r} kernels' K cache is not a permutation of a page"
            )
        self._place_of[element_at] = torch.arange(size)

    def _packed(self, isa: str, key: torch.Tensor) -> torch.Tensor:
        page_size, head_dim = self._shape
        cache = key.new_zeros(1, 1, 2 * page_size, head_dim)
        key_cache, value_cache = cache.chunk(2, dim=2)
        rows = key.unsqueeze(1)
        ops.cpu_attn_reshape_and_cache(
            rows, rows, key_cache, value_cache, torch.arange(page_size), isa
        )
        return key_cache.flatten().to(torch.int64)

    def read(self, key_cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Unpacks pages.

        Args:
            key_cache: ``[num_pages, num_kv_heads, page_size, head_dim]`` as vLLM stores it.
            pages: Indices of the pages to read, ``[n]``, int.

        Returns:
            The keys in the order of their tokens, ``[num_kv_heads, n, page_size, head_dim]``.
        """
        packed = key_cache[pages].flatten(2)
        rows = packed.index_select(2, self._place_of)
        return rows.view(*packed.shape[:2], *self._shape).transpose(0, 1)


@functools.cache
def key_page_reader(isa: str, page_size: int, head_dim: int, dtype: torch.dtype) -> KeyPageReader:
    """The reader of a packing, made once for all layers; see ``KeyPageReader``."""
    return KeyPageReader(isa, page_size, head_dim, dtype)
