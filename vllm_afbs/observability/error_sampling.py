"""Sampled errors: some sparse steps of a layer are also computed dense, and compared."""

import random
from collections.abc import Sequence

import torch

from vllm_afbs.kernels.query_blocks import PrefillRequest


def is_sampled(sample_rate: float) -> bool:
    """Draws at random whether a layer's sparse step is compared.

    The chunks of prompts arrive in a regular order. Taking every nth step could therefore always
    take the same chunk.
    """
    return random.random() < sample_rate


def relative_l1(
    output: torch.Tensor, reference: torch.Tensor, requests: Sequence[PrefillRequest]
) -> torch.Tensor:
    """Relative L1 error of a step's sparse attention, over its long prefills and all heads.

    This does not wait for the device. It allocates nothing of the size of an output, because the
    KV cache fills the memory of a server.

    Args:
        output: The sparse output, ``[num_tokens, num_heads, head_dim]``.
        reference: The dense output, like ``output``; it is overwritten.
        requests: The long prefills.

    Returns:
        Σ|output − reference| / Σ|reference|, an fp32 scalar on the tensors' device.
    """
    difference = torch.zeros((), device=output.device)
    total = torch.zeros((), device=output.device)
    for request in requests:
        rows = reference[request.rows]
        total += _absolute_sum(rows)
        rows -= output[request.rows]
        difference += _absolute_sum(rows)
    return difference / total.clamp_min_(torch.finfo(torch.float32).tiny)


def _absolute_sum(rows: torch.Tensor) -> torch.Tensor:
    # On the CPU, one norm over all elements sums them one by one, and fp32 loses the late ones.
    by_row: torch.Tensor = torch.linalg.vector_norm(rows, 1, dim=-1, dtype=torch.float32)
    return by_row.sum()
