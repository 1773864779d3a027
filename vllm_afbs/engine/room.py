"""Whether vLLM may stay loaded while layers are tuned on the same devices."""

import os

import torch

BESIDE_THE_SEARCH = 0.5
"""Share of a GPU that vLLM takes if it stays loaded while layers are tuned there."""
WITHOUT_THE_SEARCH = 0.8
"""The same if it is loaded after them: levels are settled beside it, a layer at a time."""
_MOST = 0.4
"""Share that weights and a prompt may take of a GPU where vLLM stays; the rest is activations'."""


def device_bytes() -> int:
    """Memory of the smallest GPU, or without one of the machine."""
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return min(torch.cuda.get_device_properties(each).total_memory for each in devices)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits_beside_the_search(weight_bytes: int, cache_bytes: int) -> bool:
    """Whether vLLM leaves the search about half of the memory.

    A search of some layers takes seconds and vLLM's start half a minute, so it is ended only where
    the two do not fit together.

    Args:
        weight_bytes: A rank's share of the weights.
        cache_bytes: Its share of the keys and values of a longest prompt.
    """
    return weight_bytes + cache_bytes <= _MOST * device_bytes()
