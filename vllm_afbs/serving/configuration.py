"""What vLLM's configuration says of a server, and what we send to workers with it."""

from typing import TYPE_CHECKING

from vllm_afbs import compat
from vllm_afbs.profile.layers import latent_attention
from vllm_afbs.serving.settings import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_HANDED_OVER = "afbs_handed_over"


def may_sleep(vllm_config: "VllmConfig") -> bool:
    """Whether the server's sleep mode is on, in which it can release its memory for a while."""
    return bool(vllm_config.model_config.enable_sleep_mode)


def num_decoder_layers(vllm_config: "VllmConfig") -> int:
    """Number of decoder layers, of any kind, of this worker's pipeline stage."""
    return int(vllm_config.model_config.get_num_layers(vllm_config.parallel_config))


def tells_adapters_apart(vllm_config: "VllmConfig") -> bool:
    """Whether LoRA is on, and it depends on a step's active adapters whether it may run sparse."""
    return vllm_config.lora_config is not None and read_settings(vllm_config).lora is not None


def serves_adapters(vllm_config: "VllmConfig") -> bool:
    """Whether LoRA is on, and steps with adapters that the tuner validated may run sparse."""
    return read_settings(vllm_config).lora == "validated" and vllm_config.lora_config is not None


def num_decode_rows(vllm_config: "VllmConfig") -> int:
    """Most rows of a decode: one, plus one for each drafted token that it verifies."""
    speculative = vllm_config.speculative_config
    return 1 if speculative is None else 1 + int(speculative.num_speculative_tokens)


def refused_latent_attention(vllm_config: "VllmConfig") -> str | None:
    """Why our backend cannot serve a model with latent attention; None if it need not."""
    kinds = ("mla_attention", "sliding_window_mla")
    model = vllm_config.model_config
    if not model.use_mla or not any(compat.chooses_afbs_for(vllm_config, each) for each in kinds):
        return None
    found = latent_attention(model.hf_text_config)
    return (
        f"{model.model} has {found}, and --attention-backend afbs makes full attention sparse: "
        "start it without, and vLLM runs the model's own attention"
    )


def longest_chunk(vllm_config: "VllmConfig") -> int:
    """Most tokens of one prompt that the scheduler puts into one step."""
    scheduler = vllm_config.scheduler_config
    threshold = int(scheduler.long_prefill_token_threshold)
    budget = int(scheduler.max_num_batched_tokens)
    return min(budget, threshold) if threshold > 0 else budget


def hand_over(vllm_config: "VllmConfig", **texts: str) -> None:
    """Sends texts to all workers with vLLM's configuration, beside those sent before.

    vLLM's compilation cache has everything in ``additional_config`` in its key, and these texts may
    be new at each start. They lie in a part of the configuration that is not in the key, because
    vLLM refuses to copy a ``VllmConfig`` that has more attributes than its own: it copies one for
    the text model in a vision wrapper. Copies share this part.
    """
    handed = {**handed_over(vllm_config), **texts}
    setattr(vllm_config.observability_config, _HANDED_OVER, handed)


def handed_over(vllm_config: "VllmConfig") -> dict[str, str]:
    """What ``hand_over`` sent."""
    return getattr(vllm_config.observability_config, _HANDED_OVER, {})


def num_workers(vllm_config: "VllmConfig") -> int:
    """Number of workers, on all machines, that this API server's requests may reach."""
    parallel = vllm_config.parallel_config
    engines = parallel.data_parallel_size
    if parallel.data_parallel_external_lb:
        engines = 1
    elif parallel.data_parallel_hybrid_lb:
        engines = parallel.data_parallel_size_local
    return int(engines * parallel.world_size)


def weights_source(vllm_config: "VllmConfig") -> tuple[str, str | None] | None:
    """The model whose safetensors files are served, and its revision; None if others are."""
    if vllm_config.load_config.load_format not in ("auto", "hf", "safetensors", "fastsafetensors"):
        return None
    model_config = vllm_config.model_config
    weights = getattr(model_config, "model_weights", None) or model_config.model
    return weights, model_config.revision
