"""Attention to chosen blocks by masking: the result of sparse attention, without its speed."""

import torch

from vllm_afbs.kernels import BlockGeometry, cut_keys

_MASK_ENTRIES = {"cuda": 1 << 28, "cpu": 1 << 24}
"""Entries of one call's mask: a quarter of a GiB on a GPU, and what fits a CPU's caches."""


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    geometry: BlockGeometry,
    softmax_scale: float,
    *,
    corrects: bool = False,
) -> torch.Tensor:
    """Causal attention of a whole prompt to the kept blocks, many query blocks at a time.

    Args:
        query: ``[1, num_heads, length, head_dim]``.
        key: ``[1, num_kv_heads, length, head_dim]``.
        value: Like ``key``.
        keep: ``[num_heads, num_q_blocks, num_k_blocks]``, bool.
        geometry: The blocks.
        softmax_scale: Factor of the scores.
        corrects: Whether the keys of a dropped block are replaced by their mean, and its values by
            theirs, instead of being left out.

    Returns:
        Like ``query``.
    """
    _, num_heads, length, _ = query.shape
    group = num_heads // key.shape[1]
    key, value = (rows.repeat_interleave(group, 1) for rows in (key, value))
    means = [_means(rows, geometry) for rows in (key, value)] if corrects else []
    at = torch.arange(length, device=query.device)
    output = torch.empty_like(query)
    entries = _MASK_ENTRIES[query.device.type]
    blocks = max(1, entries // (num_heads * length * geometry.block_q))
    for first in range(0, geometry.num_q_blocks, blocks):
        start, stop = first * geometry.block_q, min(length, (first + blocks) * geometry.block_q)
        rows = keep[:, first : first + blocks].repeat_interleave(geometry.block_q, 1)
        rows = rows[:, : stop - start]
        mask = rows.repeat_interleave(geometry.block_k, 2)[None, :, :, :stop]
        mask = mask & (at[:stop] <= at[start:stop, None])
        keys, values = key[:, :, :stop], value[:, :, :stop]
        if corrects:
            visible = at[start:stop, None] >= at[:: geometry.block_k][None, :]
            mask = torch.cat([_bias(mask, query), _dropped(rows, visible, query, geometry)], -1)
            keys, values = (
                torch.cat([exact, mean], 2)
                for exact, mean in zip((keys, values), means, strict=True)
            )
        output[:, :, start:stop] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop], keys, values, attn_mask=mask, scale=softmax_scale
        )
    return output


def _means(rows: torch.Tensor, geometry: BlockGeometry) -> torch.Tensor:
    """Mean of each block's rows, ``[1, num_heads, num_k_blocks, head_dim]``."""
    blocks, counts = cut_keys(rows[0].transpose(0, 1), geometry)
    return (blocks.float().sum(2) / counts[None, :, None]).to(rows.dtype)[None]


def _bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(
        ~mask, -torch.inf
    )


def _dropped(
    rows: torch.Tensor, visible: torch.Tensor, query: torch.Tensor, geometry: BlockGeometry
) -> torch.Tensor:
    """Log of the number of keys of each dropped block; only whole blocks are dropped."""
    bias = torch.full(rows.shape, geometry.block_k, dtype=query.dtype, device=query.device).log_()
    return bias.masked_fill_(rows | ~visible, -torch.inf)[None]
