"""Makes vLLM split the cache's blocks into pages that sparse prefill can read."""

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from vllm_afbs import compat
from vllm_afbs.serving.pages import split_page_sizes

PAGE_SIZE = 128
"""FlashAttention 3's key tiles have this length. The copy engine fetches pages of it whole."""


def are_readable(page_size: int, block_k: int) -> bool:
    """Whether our kernels read key blocks of this size from pages of this size.

    Key blocks are whole pages, or pages of at most ``PAGE_SIZE`` keys are whole key blocks.

    Args:
        page_size: Keys of a page.
        block_k: Keys of a key block.
    """
    return block_k % page_size == 0 or (page_size <= PAGE_SIZE and page_size % block_k == 0)


class SplitsBlocks(FlashAttentionBackend):
    """FlashAttention's backend, which names the pages and the layouts that we can read."""

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """The page sizes into which vLLM may split blocks; arguments are vLLM's."""
        given = () if kv_cache_spec is None else (kv_cache_spec,)
        return split_page_sizes(super().get_supported_kernel_block_sizes(*given))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...] | None:
        """The layouts of the cache in which vLLM can split blocks into pages."""
        return compat.split_cache_layouts()

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The page size if the user gives none."""
        return int(super().get_preferred_block_size(max(default_block_size, PAGE_SIZE)))
