"""vLLM's own attention layers and metadata, made without a model or a server."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from tests.profiles import SMALL_MODEL
from vllm_afbs.backends.cpu.backend import AfbsCPUImpl
from vllm_afbs.backends.cuda.backend import AfbsCUDAImpl

IMPLS: dict[str, Any] = {"cpu": AfbsCPUImpl, "cuda": AfbsCUDAImpl}
ARGUMENTS: dict[str, Any] = {
    "num_heads": SMALL_MODEL.num_heads,
    "head_size": SMALL_MODEL.head_dim,
    "scale": 0.2,
    "num_kv_heads": SMALL_MODEL.num_kv_heads,
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
}
"""What vLLM passes for a plain layer of ``SMALL_MODEL``."""


def make_impl(platform: str, **arguments: Any) -> Any:
    """A layer's implementation, built by the parents' constructors as on an H100."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        additional_config={},
    )
    fa = "vllm.v1.attention.backends.flash_attn"
    with ExitStack() as stack:
        stack.enter_context(patch("vllm.config.vllm._current_vllm_config", config))
        for name, value in (
            ("get_flash_attn_version", 3),
            ("flash_attn_supports_sinks", True),
            ("flash_attn_supports_kv_cache_dtype", True),
        ):
            stack.enter_context(patch(f"{fa}.{name}", Mock(return_value=value), create=True))
        hopper = Mock(to_int=lambda: 90)
        stack.enter_context(
            patch(
                "vllm.platforms.current_platform.get_device_capability", Mock(return_value=hopper)
            )
        )
        return IMPLS[platform](**ARGUMENTS | arguments)


def make_layer(impl: Any, kind: type[Attention] = Attention) -> Any:
    """The layer around an implementation."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.impl = impl
    layer.head_size = layer.head_size_v = SMALL_MODEL.head_dim
    return layer
