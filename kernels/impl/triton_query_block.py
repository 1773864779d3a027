"""``QueryBlocks`` inside kernels.

Numbers that differ from step to step, and pointers into the middle of a tensor, are never
specialized (``do_not_specialize``): a kernel would be compiled anew for each of their divisors
while a request waits.
"""

import triton
import triton.language as tl


@triton.jit
def load_query_block(table, num_blocks, index):
    """A query block: its first row, rows, first position, place when packed, block table row."""
    at = table + index
    return (
        tl.load(at),
        tl.load(at + num_blocks),
        tl.load(at + 2 * num_blocks),
        tl.load(at + 3 * num_blocks),
        tl.load(at + 4 * num_blocks),
    )
