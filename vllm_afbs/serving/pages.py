"""Which pages of the KV cache fit a profile's key blocks.

A page is what attention kernels read through a block table. vLLM allocates the cache in blocks of
``--block-size`` tokens and may split each into several pages.
"""

from collections.abc import Sequence
from typing import Any

PAGE_SIZES = (128, 64, 32, 16)
"""Keys of the pages that sparse prefill reads, largest first.

On CPUs, key blocks consist of whole pages; on GPUs, pages may also consist of whole key blocks.
"""


def split_page_sizes(stock: Sequence[Any], block_k: int | None = None) -> list[Any]:
    """Page sizes to offer vLLM, so that it splits the cache's blocks into pages that we can read.

    A kernel that takes any multiple of 16 gets whole blocks, and models with Mamba layers have
    blocks of any length: 384 or 528 tokens, for instance. Of exact sizes, vLLM takes the largest
    that divides the block.

    Args:
        stock: Page sizes that vLLM's own backend offers: exact ones, or multiples of a base.
        block_k: Keys of a key block: larger pages are left out, and so are others that are no whole
            parts of it. None, and sizes that no page divides, leave out none.

    Returns:
        The sizes, largest first; what ``stock`` holds if that is exact sizes.
    """
    bases = [size.base for size in stock if not isinstance(size, int)]
    if not bases:
        return list(stock)
    sizes = [size for size in PAGE_SIZES if any(size % base == 0 for base in bases)]
    return [size for size in sizes if block_k is not None and block_k % size == 0] or sizes
