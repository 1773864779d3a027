"""Makes the layers of a model as vLLM makes them, without its weights and in this process alone."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

RANK_COUNTS = (
    "data_parallel_size",
    "pipeline_parallel_size",
    "tensor_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""Fields of vLLM's configuration that say how many ranks share a model."""


def rank_counts(vllm_config: "VllmConfig") -> dict[str, int]:
    """Number of ranks of each kind of parallelism, by the configuration's field."""
    return {name: int(getattr(vllm_config.parallel_config, name)) for name in RANK_COUNTS}


@contextmanager
def only_rank(vllm_config: "VllmConfig") -> Iterator[None]:
    """Makes this process the only rank of a server, as vLLM's layers expect to be in one.

    The configuration is changed to say so, for good.
    """
    from vllm import distributed
    from vllm.config import set_current_vllm_config

    for name in (*RANK_COUNTS, "world_size"):
        setattr(vllm_config.parallel_config, name, 1)
    untyped: Any = distributed
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(vllm_config):
        distributed.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            untyped.destroy_model_parallel()
            untyped.destroy_distributed_environment()


def make_layers(vllm_config: "VllmConfig") -> None:
    """Makes the model's modules on ``meta``; attention layers register in the configuration.

    Must run inside ``only_rank``.
    """
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype: Any = vllm_config.model_config.dtype
    with set_default_torch_dtype(dtype), torch.device("meta"):
        initialize_model(vllm_config)
