"""Keeping freed memory in the process.

glibc hands every large block back to the kernel when it is freed, and the kernel zeroes the next
one page by page, on one core. Tensors of tens of megabytes that live for milliseconds, as in the
search, cost a third of its time on a CPU that way.
"""

import ctypes
import platform

# From glibc's malloc.h; mallopt takes ints.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Has glibc keep up to 2 GB of what is freed; for processes that are the tuner's own.

    Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _MOST)
