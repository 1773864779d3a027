"""A full disk for tests.

``RLIMIT_FSIZE`` stands for it: the kernel takes what fits below the limit and refuses the rest, as
it does on a full disk, but says "File too large". It needs no mount, and so no root.
"""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_, HARD_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """A disk that holds no file of this process beyond so many bytes.

    Bytecode is not written to it: Python does not see that it was cut short (python/cpython#126606)
    and every later import of that module would fail.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, HARD_LIMIT))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        limits, sys.dont_write_bytecode = before
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
