"""Which layers of a model have full attention, as its configuration names their kinds."""

import copy
from typing import Any

_FULL = ("full_attention", "attention")
"""What configurations call causal attention over the whole context."""


def full_layers(config: Any) -> list[int]:
    """Indices of the layers with full attention; all where the configuration names no kinds.

    Args:
        config: The text part of a ``PretrainedConfig``.
    """
    kinds = layer_kinds(config)
    if kinds is None:
        return list(range(config.num_hidden_layers))
    return [index for index, kind in enumerate(kinds) if kind in _FULL]


def tunable_layers(config: Any) -> list[int]:
    """Indices of the layers with full attention to keys and values of their own.

    In some models, such as Gemma 4, the last layers take those of earlier layers, and run dense.

    Args:
        config: The text part of a ``PretrainedConfig``.
    """
    num_sharing = getattr(config, "num_kv_shared_layers", None) or 0
    return [
        index for index in full_layers(config) if index < config.num_hidden_layers - num_sharing
    ]


def layer_kinds(config: Any) -> list[str] | None:
    """The kind of each layer, as configured; None where the configuration names no kinds.

    Args:
        config: The text part of a ``PretrainedConfig``.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return list(kinds) if kinds else None


def full_attention_config(config: Any) -> Any:
    """What a configuration says of its first layer with full attention.

    In some models, such as Gemma 4, the layers with full attention have other heads than the rest.

    Args:
        config: The text part of a ``PretrainedConfig``.
    """
    layers = full_layers(config)
    if getattr(config, "is_heterogeneous", False) and layers:
        return config.per_layer_config[layers[0]]
    if getattr(config, "global_head_dim", None) is None:
        return config
    # Versions of transformers that know no configurations by layer.
    full = copy.copy(config)
    full.head_dim = config.global_head_dim
    num_kv_heads = getattr(config, "num_global_key_value_heads", None)
    if num_kv_heads is not None and getattr(config, "attention_k_eq_v", True):
        full.num_key_value_heads = num_kv_heads
    return full


def latent_attention(config: Any) -> str:
    """Names the attention of a model with latent attention (MLA): what it has instead of ours.

    Args:
        config: The text part of a ``PretrainedConfig``.
    """
    field = next((name for name in _TRAINED_SPARSITY if getattr(config, name, None)), None)
    if field is None:
        return "dense latent attention (MLA)"
    return f"latent attention (MLA) with sparse attention trained into the model ({field})"


_TRAINED_SPARSITY = ("index_topk", "compress_ratios")
"""Fields of models that choose keys with an indexer, and of those that also compress them."""
