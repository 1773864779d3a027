"""Copies of the tiny model with something changed in them, and one that vLLM serves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.profiles import SMALL_MODEL
from tests.tuning_jobs import save_tiny_model

Weights = dict[str, torch.Tensor]


def changed_model(
    original: Path,
    directory: Path,
    change: Callable[[Weights], Weights] | None = None,
    **fields: Any,
) -> Path:
    """A copy of a checkpoint with other weights, and other fields in its config.json."""
    shutil.copytree(original, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    if change is not None:
        path = directory / "model.safetensors"
        weights = change(load_file(path))
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            path,
            metadata={"format": "pt"},
        )
    return directory


def save_small_model(directory: Path, max_position_embeddings: int = 1024) -> Path:
    """Saves a random model of ``SMALL_MODEL``'s shape: vLLM has no kernels for the tiny one's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tiny_model(directory)  # its tokenizer
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=SMALL_MODEL.num_heads * SMALL_MODEL.head_dim,
        intermediate_size=64,
        num_hidden_layers=SMALL_MODEL.num_layers,
        num_attention_heads=SMALL_MODEL.num_heads,
        num_key_value_heads=SMALL_MODEL.num_kv_heads,
        vocab_size=256,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.2,
    )
    LlamaForCausalLM(shape).save_pretrained(directory)
    return directory


ADAPTER_RANK = 8


def save_adapter(
    directory: Path, seed: int, head_dim: int = SMALL_MODEL.head_dim, logits: int = 0
) -> Path:
    """A LoRA adapter for ``SMALL_MODEL``'s numbers of heads and layers, in the format of PEFT.

    Args:
        directory: Made here.
        seed: Of its weights.
        head_dim: Size of a head.
        logits: Vocabulary of the model if the adapter also changes its logits. On the CPU, vLLM
            0.32 then also changes those of the base model.
    """
    width = SMALL_MODEL.num_heads * head_dim
    counts = {"q_proj": SMALL_MODEL.num_heads, "k_proj": SMALL_MODEL.num_kv_heads}
    modules = {
        f"model.layers.{layer}.self_attn.{name}": count * head_dim
        for layer in range(SMALL_MODEL.num_layers)
        for name, count in counts.items()
    }
    if logits:
        modules["lm_head"] = logits
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, count in modules.items():
        for part, shape in (("lora_A", (ADAPTER_RANK, width)), ("lora_B", (count, ADAPTER_RANK))):
            tensor = 0.3 * torch.randn(shape, generator=random)
            weights[f"base_model.model.{name}.{part}.weight"] = tensor
    config = {
        "peft_type": "LORA", "r": ADAPTER_RANK, "lora_alpha": 2 * ADAPTER_RANK, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }  # fmt: skip
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


def merged(model: Path, adapter: Path, directory: Path) -> Path:
    """A copy of a model with an adapter added to its weights, by LoRA's formula."""
    delta = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]

    def change(weights: Weights) -> Weights:
        found = dict(weights)
        for name, weight in weights.items():
            parts = [
                delta.get(f"base_model.model.{name.removesuffix('weight')}{part}.weight")
                for part in ("lora_A", "lora_B")
            ]
            if (a := parts[0]) is not None and (b := parts[1]) is not None:
                found[name] = weight + scale * b @ a
        return found

    return changed_model(model, directory, change)


def is_linear(name: str) -> bool:
    return "_proj." in name


def fp8_by_tensor(weights: Weights) -> Weights:
    """Linear layers in FP8 with one scale each, under the names that ModelOpt gives them."""
    found: Weights = {}
    for name, weight in weights.items():
        if not is_linear(name):
            found[name] = weight
            continue
        scale = weight.abs().max() / 448
        found[name] = (weight / scale).to(torch.float8_e4m3fn)
        found[f"{name}_scale"] = scale.float()
    return found


def fp8_by_block(weights: Weights, size: int = 32) -> Weights:
    """Linear layers in FP8 with a scale for each block, as DeepSeek and Qwen publish them."""
    found: Weights = {}
    for name, weight in weights.items():
        if not is_linear(name):
            found[name] = weight
            continue
        rows, columns = weight.shape
        blocks = weight.reshape(rows // size, size, columns // size, size)
        scales = blocks.abs().amax((1, 3)) / 448
        packed = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        found[name] = packed.to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scales.float()
    return found
