"""``BlockGeometry`` inside kernels."""

import triton
import triton.language as tl


@triton.jit
def block_span(q_block, q_len, kv_len, BLOCK_Q: tl.constexpr):
    """Positions of a step's query block: where it is cut, its first row and its last."""
    first_row = kv_len - q_len
    start = (first_row // BLOCK_Q + q_block) * BLOCK_Q
    return start, tl.maximum(start, first_row), tl.minimum(start + BLOCK_Q, kv_len) - 1
