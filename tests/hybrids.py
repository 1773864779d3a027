"""Tiny models whose layers are not all full attention: configurations of every kind that we serve.

``save`` writes a checkpoint of random weights. ``FULL`` says which layers have full attention, as
their authors describe it; the tests compare servers and tuners with that.
"""

import json
from pathlib import Path
from typing import Any

import torch

WINDOW, LENGTH = 64, 1024
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR = "linear_attention"

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # so that rows attend to some keys more than to others
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _windows(model_type: str, architecture: str, *kinds: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "num_hidden_layers": len(kinds),
        "layer_types": list(kinds),
        "sliding_window": WINDOW,
        **fields,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "gemma-2": _windows(
        "gemma2", "Gemma2ForCausalLM", SLIDING, FULL,
        query_pre_attn_scalar=32, attn_logit_softcapping=50.0, tie_word_embeddings=True,
    ),
    "gemma-3": _windows(
        "gemma3_text", "Gemma3ForCausalLM", SLIDING, SLIDING, FULL, SLIDING, FULL,
        query_pre_attn_scalar=32, rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma-4": _windows(
        # The full layers have other heads, and the last two layers share keys and values.
        "gemma4_text", "Gemma4ForCausalLM", SLIDING, FULL, SLIDING, FULL, SLIDING, FULL,
        head_dim=32, global_head_dim=64, attention_k_eq_v=True, num_global_key_value_heads=1,
        num_kv_shared_layers=2, hidden_size_per_layer_input=0, vocab_size_per_layer_input=256,
    ),
    "olmo-3": _windows("olmo3", "Olmo3ForCausalLM", SLIDING, SLIDING, SLIDING, FULL),
    "cohere-2": _windows(
        "cohere2", "Cohere2ForCausalLM", SLIDING, SLIDING, SLIDING, FULL,
        logit_scale=0.25, tie_word_embeddings=True,
    ),
    "gpt-oss": _windows(
        "gpt_oss", "GptOssForCausalLM", SLIDING, FULL,
        num_local_experts=2, num_experts_per_tok=1, rope_parameters={
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 2.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 1024,
        },
    ),
    "llama-4": {
        **_windows("llama4_text", "Llama4ForCausalLM", CHUNKED, FULL),
        "attention_chunk_size": 256, "no_rope_layers": [1, 0], "intermediate_size_mlp": 64,
        "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
    },
    "granite-4": _windows(
        "granitemoehybrid", "GraniteMoeHybridForCausalLM", "mamba", FULL,
        layer_types=["mamba", "attention"], layers_block_type=["mamba", "attention"],
        sliding_window=None, num_local_experts=0, num_experts_per_tok=0,
        shared_intermediate_size=64, mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16,
        mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=64, attention_multiplier=0.2,
        position_embedding_type="rope", hidden_act="silu", head_dim=None, hidden_size=128,
    ),
    "qwen-3-next": _windows(
        "qwen3_next", "Qwen3NextForCausalLM", LINEAR, LINEAR, LINEAR, FULL,
        sliding_window=None, partial_rotary_factor=0.25, num_experts=2, num_experts_per_tok=1,
        decoder_sparse_step=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, head_dim=64,
    ),
    "phi-4": {
        # Windows in the configuration and none in a layer: every layer is full.
        **_windows("phi3", "Phi3ForCausalLM", FULL, FULL),
        "sliding_window": 262_144, "layer_types": None,
    },
}  # fmt: skip
"""config.json of each model, over ``_SIZES``."""


def config(name: str) -> dict[str, Any]:
    """The whole config.json of a model."""
    fields = _SIZES | CONFIGS[name]
    return {field: value for field, value in fields.items() if value is not None}


def full_layers(name: str) -> list[int]:
    """Indices of a model's layers with full attention."""
    kinds = CONFIGS[name]["layer_types"] or [FULL] * CONFIGS[name]["num_hidden_layers"]
    return [index for index, kind in enumerate(kinds) if kind in (FULL, "attention")]


def save(name: str, directory: Path) -> Path:
    """Writes a model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config(name)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    model.float().save_pretrained(directory)
    return directory
