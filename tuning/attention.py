"""What the attention functions share that models here are run with, as transformers calls them."""

import torch


def scale_of(query: torch.Tensor, scaling: float | None) -> float:
    """The factor of the scores; models that name none mean the usual one.

    Args:
        query: ``[1, num_heads, length, head_dim]``.
        scaling: What transformers passes on.
    """
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """Plain causal attention.

    Args:
        query: ``[1, num_heads, length, head_dim]``.
        key: ``[1, num_kv_heads, length, head_dim]``.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=softmax_scale, enable_gqa=True
    )


def returned(output: torch.Tensor) -> tuple[torch.Tensor, None]:
    """An output as transformers wants it: heads last but one, and no weights."""
    return output.transpose(1, 2).contiguous(), None
