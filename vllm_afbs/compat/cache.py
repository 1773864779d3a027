"""vLLM's KV cache: what layers keep there, how they share it, and how it is split into pages."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PAGE_SIZES = (128, 64, 32, 16)
"""Keys of the pages that sparse prefill reads; key blocks consist of whole pages."""


def split_page_sizes(stock: Sequence[Any]) -> list[Any]:
    """Page sizes to offer vLLM, so that it splits the cache's blocks into pages that we can read.

    A kernel that takes any multiple of 16 gets whole blocks, and models with Mamba layers have
    blocks of any length: 384 or 528 tokens, for instance. Of exact sizes, vLLM takes the largest
    that divides the block.

    Args:
        stock: Page sizes that vLLM's own backend offers: exact ones, or multiples of a base.
    """
    bases = [size.base for size in stock if not isinstance(size, int)]
    if not bases:
        return list(stock)
    return [size for size in PAGE_SIZES if any(size % base == 0 for base in bases)]


def split_cache_layouts() -> "tuple[Any, ...] | None":
    """Cache layouts in which vLLM can split blocks into pages, preferred first; None before 0.32.

    In other layouts a block of one layer lies between those of other layers.
    """
    try:
        layout = importlib.import_module("vllm.v1.kv_cache_layout").KVCacheLayout
    except ModuleNotFoundError:
        return None
    return layout.LBNHC, layout.LBHNC


def cache_specs(vllm_config: "VllmConfig") -> dict[str, Any]:
    """What each layer with a cache of its own keeps there, as vLLM's workers ask for it."""
    specs = {}
    for name, layer in _layers_of_any_kind(vllm_config).items():
        shares = getattr(layer, "kv_sharing_target_layer_name", None) is not None
        spec = None if shares else layer.get_kv_cache_spec(vllm_config)
        if spec is not None:
            specs[name] = spec
    return specs


def cache_groups(vllm_config: "VllmConfig") -> list[Any]:
    """The groups in which layers share their pages, as vLLM's engine forms them."""
    from vllm.v1.attention.backends import utils

    specs = cache_specs(vllm_config)
    resolve = getattr(utils, "resolve_kv_cache_layout", None)
    if resolve is not None:  # from some version on; groups then depend on the layout
        layers = _layers_of_any_kind(vllm_config)
        backends = [layers[name].get_attn_backend() for name in specs]
        supported = vars(utils)["get_supported_kv_cache_layouts"](backends)
        resolve(vllm_config, [[layout.name for layout in supported]], list(specs.values()))
    return list(_group_layers(vllm_config, specs))


def _group_layers(vllm_config: "VllmConfig", specs: dict[str, Any]) -> Iterable[Any]:
    group_layers: Callable[..., Iterable[Any]]
    try:
        builders: Any = importlib.import_module("vllm.v1.core.kv_cache_config_builder")
    except ModuleNotFoundError:  # before 0.33
        from vllm.v1.core import kv_cache_utils

        group_layers = vars(kv_cache_utils)["get_kv_cache_groups"]
    else:
        group_layers = builders.get_kv_cache_config_builder(vllm_config).get_kv_cache_groups
    return group_layers(vllm_config, specs)


def _layers_of_any_kind(vllm_config: "VllmConfig") -> dict[str, Any]:
    """All layers that may have a cache: those of Mamba and latent attention included."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    kind: Any = AttentionLayerBase
    return dict(get_layers_from_vllm_config(vllm_config, kind))
