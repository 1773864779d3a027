"""Quantised checkpoints, made with the library that vLLM reads them with.

    python -m tests.quantised_checkpoints SOURCE TARGET SCHEME

SCHEME is a preset of compressed-tensors, for instance W8A8 or FP8_DYNAMIC. Weights are rounded to
the nearest; nothing is calibrated.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch


def quantise(source: Path, target: Path, scheme: str) -> None:
    """Writes a checkpoint with quantised linear layers, on a GPU if there is one."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device)
    groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
    config = QuantizationConfig(
        config_groups=groups, ignore=["lm_head"], quantization_status="initialized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        settings = getattr(module, "quantization_scheme", None)
        if settings is None:
            continue
        low, high = module.weight.aminmax(dim=1, keepdim=True)
        scale, zero_point = calculate_qparams(low, high, settings.weights)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero_point.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, target)


if __name__ == "__main__":
    quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
