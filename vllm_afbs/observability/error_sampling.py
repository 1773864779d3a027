"""Sampled quality: now and then a sparse layer is computed dense as well, and compared."""

import random
from collections.abc import Sequence

import torch

from vllm_afbs.kernels.query_blocks import PrefillRequest


def is_sampled(sample_rate: float) -> bool:
    """Draws whether a layer's sparse step is compared.

    Drawn rather than counted: the chunks of a prompt come in a rhythm, and counting would always
    meet the same one.
    """
    return random.random() < sample_rate


def relative_l1(
    output: torch.Tensor, reference: torch.Tensor, requests: Sequence[PrefillRequest]
) -> torch.Tensor:
    """Error of a step's sparse attention, over the rows of its long prefills and all heads.

    Nothing waits for the device, and nothing as large as an output is allocated: a server's
    memory is full of KV cache.

    Args:
        output: Sparse, ``[num_tokens, num_heads, head_dim]``.
        reference: Dense, like ``output``; overwritten.
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
    # On the CPU a norm over everything adds up one by one, and fp32 then loses what comes late.
    by_row: torch.Tensor = torch.linalg.vector_norm(rows, 1, dim=-1, dtype=torch.float32)
    return by_row.sum()
