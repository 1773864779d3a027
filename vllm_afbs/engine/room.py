"""Whether vLLM may stay loaded while layers are tuned on the same devices."""

import os
from collections.abc import Sequence

import torch

from vllm_afbs.errors import InputError
from vllm_afbs.models.hub import Checkpoint

BESIDE_THE_SEARCH = 0.5
"""Share of a GPU that vLLM takes if it stays loaded while layers are tuned there."""
WITHOUT_THE_SEARCH = 0.8
"""The same if it is loaded after them: levels are settled beside it, a layer at a time."""
_MOST = 0.4
"""Share that weights and a prompt may take of a GPU where vLLM stays; the rest is activations'."""

_OPTIONS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")


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


def stays_loaded(
    arguments: Sequence[str], checkpoint: Checkpoint, num_ranks: int, cache_bytes: int
) -> bool:
    """Whether vLLM stays loaded while layers are tuned: if it fits, and its memory is ours to set.

    Args:
        arguments: What ``vllm serve`` would be given.
        checkpoint: The model's files.
        num_ranks: GPUs that share the weights.
        cache_bytes: A rank's share of the keys and values of a longest prompt.
    """
    if _memory_is_given(arguments):
        return False
    try:
        files = checkpoint.weight_files()
    except InputError:  # in a format whose size says little of what is loaded
        return False
    weight_bytes = sum(file.stat().st_size for file in files)
    return fits_beside_the_search(weight_bytes // num_ranks, cache_bytes)


def memory_share(arguments: Sequence[str], stays: bool) -> float | None:
    """Share of the GPU for a vLLM that the tuner runs; None for what it was given.

    Args:
        arguments: What ``vllm serve`` would be given.
        stays: Whether it stays loaded while layers are tuned.
    """
    if _memory_is_given(arguments):
        return None
    return BESIDE_THE_SEARCH if stays else WITHOUT_THE_SEARCH


def _memory_is_given(arguments: Sequence[str]) -> bool:
    return any(each.replace("_", "-").startswith(_OPTIONS) for each in arguments)
