"""Decides whether a server, a layer or its place in the model allows sparse prefill.

Sparse prefill approximates causal softmax attention over the whole context and nothing else. A
layer that is not known to compute exactly that runs dense, so whatever a later vLLM adds to layers
counts as unsupported until we have read it.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from vllm_afbs import compat
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import configuration
from vllm_afbs.serving.reasons import Reason

KNOWN_ARGUMENTS = frozenset(
    {
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "alibi_slopes",
        "sliding_window",
        "kv_cache_dtype",
        "logits_soft_cap",
        "attn_type",
        "kv_sharing_target_layer_name",
        "sinks",
    }
)
"""Arguments of vLLM's implementations that sparse prefill honours, or that ``layer_obstacles`` or
the backend's ``unsupported_feature`` checks."""

PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16")
"""vLLM's names for caches that are not quantised."""


def unknown_arguments(
    constructor: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Names the arguments of a layer that we do not know.

    Args:
        constructor: The bound ``__init__`` of vLLM's implementation.
        args: The positional arguments that it was called with.
        kwargs: The keyword arguments that it was called with.

    Returns:
        Names of arguments that are not in ``KNOWN_ARGUMENTS`` and not at their default.
    """
    signature = inspect.signature(constructor)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif value is not signature.parameters[name].default:
            given[name] = value
    return [name for name in given if name not in KNOWN_ARGUMENTS]


def server_obstacles(vllm_config: Any) -> dict[Reason, bool]:
    """The conditions that make every layer of a server dense, each with whether it holds."""
    return {
        # A row's result may depend on its prompt's chunks and on the rest of the batch.
        "batch_invariant": compat.is_batch_invariant(),
        # An adapter changes queries and keys. The profile was tuned without it.
        "lora": vllm_config.lora_config is not None
        and not configuration.tells_adapters_apart(vllm_config),
        # The thresholds are allocated together with the KV cache. Versions of vLLM differ in
        # whether they restore such tensors after sleep.
        "sleep_mode": configuration.may_sleep(vllm_config),
    }


def layer_obstacles(impl: Any, page_size: int, profile: Profile | None) -> dict[Reason, bool]:
    """The conditions that no sparse prefill supports, each with whether this layer has it."""
    return {
        "attention_type": impl.attn_type != "decoder",
        "kv_sharing": impl.kv_sharing_target_layer_name is not None,
        "alibi": impl.alibi_slopes is not None,
        "page_size": profile is not None and profile.block_k % page_size != 0,
        "context_parallel": impl.dcp_world_size > 1 or impl.pcp_world_size > 1,
        "unknown_argument": bool(impl.unknown_arguments),
    }


def place_obstacles(
    layer: Any, index: int | None, profile: Profile, tensor_parallel_size: int
) -> dict[Reason, bool]:
    """The conditions under which a layer is not one of the profile's, each with whether it holds.

    Args:
        layer: vLLM's attention layer.
        index: Index of the decoder layer whose only attention it is; None if there is none.
        profile: The served profile.
        tensor_parallel_size: Number of ranks that share the model's heads.
    """
    impl, model = compat.attention_impl(layer), profile.model
    heads = impl.num_heads * tensor_parallel_size, impl.num_kv_heads, impl.head_size
    # If there are fewer KV heads than ranks, each rank has a copy of one.
    num_kv_heads = max(1, model.num_kv_heads // tensor_parallel_size)
    return {
        "attention_type": not compat.is_plain_attention(layer),
        "unknown_layer": index is None or index >= model.num_layers,
        "head_shape": heads != (model.num_heads, num_kv_heads, model.head_dim),
    }


def capture_obstacle(layer: Any, cache_dtypes: Collection[str]) -> Reason | None:
    """Why a layer's attention is not what the tuner measures; None if it is.

    Args:
        layer: vLLM's attention layer.
        cache_dtypes: Types of the KV cache that can be recorded.
    """
    impl = compat.attention_impl(layer)
    return first_true(
        {
            "attention_type": not compat.is_plain_attention(layer) or impl.attn_type != "decoder",
            "kv_sharing": impl.kv_sharing_target_layer_name is not None,
            "alibi": impl.alibi_slopes is not None,
            "kv_cache_dtype": impl.kv_cache_dtype not in cache_dtypes,
        }
    )


def is_local(layer: Any, profile: Profile | None) -> bool:
    """Whether a layer attends to a part of the context by the model's design: a window or a chunk.

    Args:
        layer: vLLM's attention layer.
        profile: The served profile.
    """
    return compat.is_chunked_attention(layer) or window_hides_keys(
        compat.attention_impl(layer).window, profile
    )


def window_hides_keys(window: int, profile: Profile | None) -> bool:
    """Whether a sliding window hides keys in contexts that a profile makes sparse.

    Args:
        window: Keys that a row sees, itself included; below 1 for all.
        profile: The served profile.
    """
    return window >= 1 and (profile is None or window < profile.max_seq_len)


def first_true(conditions: Mapping[Reason, bool]) -> Reason | None:
    """The first condition that holds; None if none does."""
    return next((name for name, holds in conditions.items() if holds), None)
