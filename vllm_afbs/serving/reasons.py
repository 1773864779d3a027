"""Every reason why a prefill runs dense.

The operator's page and the Prometheus rules list the same reasons with the same kinds. A test
compares them with this list, and mypy checks every use against ``Reason``.
"""

from typing import Literal

Kind = Literal["chosen", "changing", "fixed"]
"""Where a reason comes from.

Chosen: the model, the dispatcher, the profile or the operator decided it. Changing: it depends on
the request. Fixed: it follows from the layer or from how the server was started, so it holds for
all prefills of a layer or for none.
"""

Reason = Literal[
    "short_query",
    "short_context",
    "dense_is_faster",
    "profile_dense",
    "no_profile",
    "disabled",
    "local_attention",
    "long_context",
    "active_adapter",
    "attention_mask",
    "unknown_lengths",
    "unmeasured_gpu",
    "kv_cache_dtype",
    "page_size",
    "cache_layout",
    "block_size",
    "context_parallel",
    "batch_invariant",
    "lora",
    "sleep_mode",
    "output_quantization",
    "alibi",
    "attention_type",
    "kv_sharing",
    "head_shape",
    "unknown_layer",
    "unknown_argument",
]

KINDS: dict[Reason, Kind] = {
    "short_query": "chosen",
    "short_context": "chosen",
    "dense_is_faster": "chosen",
    "profile_dense": "chosen",
    "no_profile": "chosen",
    "disabled": "chosen",
    "local_attention": "chosen",
    "long_context": "changing",
    "active_adapter": "changing",
    "attention_mask": "changing",
    "unknown_lengths": "changing",
    "unmeasured_gpu": "fixed",
    "kv_cache_dtype": "fixed",
    "page_size": "fixed",
    "cache_layout": "fixed",
    "block_size": "fixed",
    "context_parallel": "fixed",
    "batch_invariant": "fixed",
    "lora": "fixed",
    "sleep_mode": "fixed",
    "output_quantization": "fixed",
    "alibi": "fixed",
    "attention_type": "fixed",
    "kv_sharing": "fixed",
    "head_shape": "fixed",
    "unknown_layer": "fixed",
    "unknown_argument": "fixed",
}
