"""How transformers calls the attention of the models that the tuner runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_afbs.profile.layers import layer_kinds

# Arguments by which a transformers model asks its attention function for a variant.
_VARIANTS = ("softcap", "s_aux", "position_bias")
_LOCAL_ROWS = 512
"""Rows of a window or a chunk that are attended at once: their mask is small."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as a model asks for it.

    Attributes:
        layer: Index of the layer.
        query: ``[num_sequences, num_heads, length, head_dim]``.
        key: ``[num_sequences, num_kv_heads, kv_len, head_dim]``.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
        variants: Names of what the model wants beyond causal attention.
        window: Keys that a row sees, itself included; None for all.
        chunk_size: Rows see only keys of their own chunk, of this many tokens; None for all.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax_scale: float
    variants: tuple[str, ...]
    window: int | None = None
    chunk_size: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether rows see a part of the context only."""
        return self.window is not None or self.chunk_size is not None

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of the first sequence, each ``[length, heads, head_dim]``."""
        query, key, value = (each[0].transpose(0, 1) for each in (self.query, self.key, self.value))
        return query, key, value

    def dense(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Causal attention of whole sequences, to the window or chunk if there is one.

        Args:
            mask: Which keys each query attends to instead of the causal ones, broadcast to
                ``[num_sequences, num_heads, length, kv_len]``, bool; for layers that see all.

        Returns:
            Like ``query``.
        """
        if self.is_local:
            assert mask is None
            return self._local()
        return torch.nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=mask, is_causal=mask is None,
            scale=self.softmax_scale, enable_gqa=True,
        )  # fmt: skip

    def _local(self) -> torch.Tensor:
        length = self.query.shape[2]
        at = torch.arange(length, device=self.query.device)
        first = at - (self.window or length) + 1
        if self.chunk_size is not None:
            first = torch.maximum(first, at // self.chunk_size * self.chunk_size)
        output = torch.empty_like(self.query)
        for start in range(0, length, _LOCAL_ROWS):
            rows = slice(start, min(start + _LOCAL_ROWS, length))
            seen = slice(max(int(first[start]), 0), rows.stop)
            mask = (at[seen] <= at[rows, None]) & (at[seen] >= first[rows, None])
            output[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(
                self.query[:, :, rows], self.key[:, :, seen], self.value[:, :, seen],
                attn_mask=mask, scale=self.softmax_scale, enable_gqa=True,
            )  # fmt: skip
        return output


def _chunk_size(module: Any) -> int | None:
    """Tokens of the chunks that a layer attends to: transformers would tell it by a mask only."""
    kinds = layer_kinds(module.config)
    if kinds is None or kinds[module.layer_idx] != "chunked_attention":
        return None
    return int(module.config.attention_chunk_size)


def register(name: str, attend: Callable[[AttentionCall], torch.Tensor]) -> None:
    """Registers an attention function, for models that are loaded with its name.

    Args:
        name: Name of the function in transformers; a function of that name is replaced.
        attend: Returns the output, with the shape of ``query``.
    """
    from transformers import AttentionInterface

    def called(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        asked = {**others, "attention_mask": attention_mask}
        variants = (each for each in (*_VARIANTS, "attention_mask") if asked.get(each) is not None)
        # A model that gives no factor means the usual one.
        softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        call = AttentionCall(
            module.layer_idx, query, key, value, softmax_scale, tuple(variants),
            asked.get("sliding_window"), _chunk_size(module),
        )  # fmt: skip
        # Transformers expects heads last but one, and takes None for the weights.
        return attend(call).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, called)
