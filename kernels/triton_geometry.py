"""``QueryBlocks`` inside kernels."""

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
