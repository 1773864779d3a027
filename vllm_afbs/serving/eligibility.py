"""What sparse prefill cannot do, and how a server, a layer or its place in the model asks for it.

Sparse attention approximates causal softmax attention over the whole context and nothing else. So
what is not known to be that is dense: what vLLM may add to a layer counts as unsupported until
somebody has read it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_afbs import compat
from vllm_afbs.profile.schema import Profile
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
"""Arguments of vLLM's implementations that sparse prefill does as asked, or looks at in
``layer_limits`` or a backend's own limits."""

PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16")


def unknown_arguments(
    constructor: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Names what a layer is given beyond the arguments that we know.

    Args:
        constructor: The parent's bound ``__init__``.
        args: What it was called with.
        kwargs: What it was called with by name.

    Returns:
        Names of arguments that are not among ``KNOWN_ARGUMENTS`` and not at their default.
    """
    signature = inspect.signature(constructor)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif value is not signature.parameters[name].default:
            given[name] = value
    return [name for name in given if name not in KNOWN_ARGUMENTS]


def server_limits(vllm_config: Any) -> dict[Reason, bool]:
    """What keeps every layer of a server dense."""
    return {
        # The result of a row may depend on how a prompt was cut and on what ran beside it.
        "batch_invariant": compat.is_batch_invariant(),
        # An adapter changes queries and keys; the profile's errors were measured without it.
        "lora": vllm_config.lora_config is not None,
        # The thresholds are allocated while the KV cache is; whether such tensors are restored on
        # waking up differs between versions of vLLM.
        "sleep_mode": compat.may_sleep(vllm_config),
    }


def layer_limits(impl: Any, page_size: int, profile: Profile | None) -> dict[Reason, bool]:
    """What no platform's sparse prefill can do, and whether this layer asks for it."""
    return {
        "attention_type": impl.attn_type != "decoder",
        "kv_sharing": impl.kv_sharing_target_layer_name is not None,
        "alibi": impl.alibi_slopes is not None,
        "sinks": impl.sinks is not None,
        "page_size": profile is not None and profile.block_k % page_size != 0,
        "kv_cache_dtype": impl.kv_cache_dtype not in PLAIN_CACHE_DTYPES,
        "context_parallel": impl.dcp_world_size > 1 or impl.pcp_world_size > 1,
        "unknown_argument": bool(impl.unknown_arguments),
    }


def place_limits(
    layer: Any, index: int | None, profile: Profile, tensor_parallel_size: int
) -> dict[Reason, bool]:
    """What keeps a layer from having a place in the profile.

    Args:
        layer: vLLM's attention layer.
        index: Of the decoder layer it is alone in; None if it is in none, or not alone.
        profile: The served profile.
        tensor_parallel_size: Ranks that the model's heads are split among.
    """
    impl, model = layer.impl, profile.model
    heads = impl.num_heads * tensor_parallel_size, impl.num_kv_heads, impl.head_size
    # With fewer KV heads than ranks, each rank has a copy of one.
    num_kv_heads = max(1, model.num_kv_heads // tensor_parallel_size)
    return {
        "attention_type": not compat.is_plain_attention(layer),
        "unknown_layer": index is None or index >= model.num_layers,
        "head_shape": heads != (model.num_heads, num_kv_heads, model.head_dim),
    }


def window_hides_keys(window: int, profile: Profile | None) -> bool:
    """Whether a sliding window hides keys in contexts that a profile makes sparse.

    Args:
        window: Keys that a row sees, itself included; below 1 for all.
        profile: The served profile.
    """
    return window >= 1 and (profile is None or window < profile.max_seq_len)


def first_true(conditions: Mapping[Reason, bool]) -> Reason | None:
    """Name of the first condition that holds, None if none does."""
    return next((name for name, holds in conditions.items() if holds), None)
