"""Running out of memory, said in one line wherever it happens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm_afbs.errors import InputError

_HOST = re.compile(r"DefaultCPUAllocator|[Cc](?:an't|annot) allocate memory|bad_alloc")
_GPU = re.compile(r"CUDA(?: driver)? error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_AMOUNT = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


def exhausted(error: BaseException) -> str | None:
    """Which memory an exception says has run out, with the amount asked for; None for others."""
    if isinstance(error, InputError):
        return None
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or _GPU.search(text):
        kind = "GPU memory"
    elif isinstance(error, MemoryError) or _HOST.search(text):
        kind = "memory"
    else:
        return None
    amount = _AMOUNT.search(text)
    return f"{kind} ({amount[1]} more asked for)" if amount else kind


@contextmanager
def explained(doing: str, advice: str) -> Iterator[None]:
    """Says what ran out of memory, and what to do about it.

    Args:
        doing: What is done inside, for the message.
        advice: What to shorten.

    Raises:
        InputError: Instead of the allocator's exception.
    """
    try:
        yield
    except Exception as error:
        if (kind := exhausted(error)) is None:
            raise
        raise InputError(f"out of {kind} while {doing}: {advice}") from None
