"""Which configurations can be tuned: causal attention over the whole context in some layers."""

from typing import Any

from vllm_afbs.profile.layers import full_layers, latent_attention, layer_kinds
from vllm_afbs.profile.rope import rope_parameters


def unsupported(config: Any) -> str | None:
    """Why a model cannot be tuned, with the field; None if it can.

    Args:
        config: The model's ``PretrainedConfig``.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    architectures = config.architectures or ["none"]
    if not isinstance(architectures, list) or config.is_encoder_decoder:
        return "architectures: a list with a decoder-only causal language model expected"
    text = config.get_text_config()
    if text is not config:
        return (
            "architectures: a decoder-only causal language model without parts for images or sound "
            f"expected, got {str(architectures[0])[:100]}: take --engine vllm"
        )
    if architectures[0] not in DECODERS.values():
        return (
            "architectures: a decoder-only causal language model expected, got "
            f"{str(architectures[0])[:100]}"
        )
    if reason := _other_attention(text) or _partial_layers(text):
        return reason
    if not getattr(MODEL_MAPPING[type(config)], "_supports_attention_backend", False):
        return f"model_type: {text.model_type} in transformers takes no custom attention function"
    return None


def _other_attention(text: Any) -> str | None:
    if getattr(text, "kv_lora_rank", None):
        return f"kv_lora_rank: {latent_attention(text)} is not supported"
    position_type = getattr(text, "position_embedding_type", None)
    if getattr(text, "alibi", False) or position_type == "alibi":
        return "alibi: linear position biases (ALiBi) are not supported"
    if text.model_type in ("bloom", "mpt"):
        return f"model_type: {text.model_type} has position biases (ALiBi), not supported"
    if getattr(text, "attn_logit_softcapping", None):
        return "attn_logit_softcapping: null expected: capped scores are not supported"
    if getattr(text, "dual_chunk_attention_config", None):
        return (
            "dual_chunk_attention_config: null expected: attention in chunks is not supported "
            "(null in --hf-overrides, here and for the server, uses plain attention)"
        )
    if rope_type(text) == "dynamic":
        return (
            "rope_parameters.rope_type: another type than dynamic expected: transformers and vLLM "
            "stretch positions differently with it"
        )
    return None


def rope_type(text: Any) -> str:
    """The kind of rotary embedding of full layers; ``default`` if nothing is configured.

    Args:
        text: The text part of a ``PretrainedConfig``.
    """
    return str(rope_parameters(text).get("rope_type", "default"))


def least_longest_length(config: Any) -> int:
    """Tokens that the longest calibrated length must have at least, for the model's positions.

    vLLM computes every prompt with LongRoPE's long factors as soon as ``max_model_len`` exceeds the
    original positions. transformers takes them only for contexts beyond the original positions.

    Args:
        config: The model's ``PretrainedConfig``.
    """
    text = config.get_text_config()
    if rope_type(text) != "longrope":
        return 1
    parameters = text.rope_parameters
    original = parameters.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", 0
    )
    return int(original) + 1 if text.max_position_embeddings > original else 1


def _partial_layers(text: Any) -> str | None:
    kinds = layer_kinds(text)
    if kinds is not None:
        full = full_layers(text)
        if not full:
            found = ", ".join(dict.fromkeys(kinds))
            return f"layer_types: full_attention expected in some layer, got {found}"
        if getattr(text, "is_heterogeneous", False):
            return _unequal_layers(text, full)
        return None
    if getattr(text, "is_heterogeneous", False):
        return _unequal_layers(text, full_layers(text))
    if window := getattr(text, "sliding_window", None):
        reach = text.max_position_embeddings
        return (
            f"sliding_window: null expected, or at least max_position_embeddings ({reach}), "
            f"got {window}"
        )
    return None


def _unequal_layers(text: Any, full: list[int]) -> str | None:
    """Why layers with full attention have different shapes; None if they are equal."""
    for name in ("head_dim", "num_attention_heads", "num_key_value_heads"):
        values = {getattr(text.per_layer_config[layer], name, None) for layer in full}
        if len(values) > 1:
            return f"per_layer_config: one {name} of all layers with full attention expected"
    return None


def widen_windows(text: Any, reach: int) -> None:
    """Takes sliding windows for none that hide nothing from any position.

    Args:
        text: The text part of a ``PretrainedConfig``, changed in place.
        reach: Positions of the model.
    """
    window = getattr(text, "sliding_window", None)
    # vLLM takes 0 for none, too.
    if not isinstance(window, int) or isinstance(window, bool) or (window != 0 and window < reach):
        return
    text.sliding_window = None
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = [
            "full_attention" if kind == "sliding_attention" else kind for kind in kinds
        ]
