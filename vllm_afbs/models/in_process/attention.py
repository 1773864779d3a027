"""How transformers calls the attention of the models that the tuner runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Arguments by which a transformers model asks its attention function for a variant.
_VARIANTS = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention, as a model asks for it.

    Attributes:
        layer: Index of the layer.
        query: ``[num_sequences, num_heads, length, head_dim]``.
        key: ``[num_sequences, num_kv_heads, kv_len, head_dim]``.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
        variants: Names of what the model wants beyond plain causal attention.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax_scale: float
    variants: tuple[str, ...]

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of the first sequence, each ``[length, heads, head_dim]``."""
        query, key, value = (each[0].transpose(0, 1) for each in (self.query, self.key, self.value))
        return query, key, value

    def dense(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Plain causal attention, like ``query``.

        Args:
            mask: Which keys each query attends to instead of the causal ones, broadcast to
                ``[num_sequences, num_heads, length, kv_len]``, bool.
        """
        return torch.nn.functional.scaled_dot_product_attention(
            self.query, self.key, self.value, attn_mask=mask, is_causal=mask is None,
            scale=self.softmax_scale, enable_gqa=True,
        )  # fmt: skip


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
        call = AttentionCall(module.layer_idx, query, key, value, softmax_scale, tuple(variants))
        # Transformers expects heads last but one, and takes None for the weights.
        return attend(call).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, called)
