"""Quantised checkpoints: decoded where transformers decodes them, and refused everywhere else.

A loader that does not know a method reads its packed numbers as if they were the weights. What was
tuned on those would look like any other profile.
"""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vllm_afbs.errors import InputError, one_line

ADVICE = "tune the unquantised model instead: its profile serves this one too"

_NOTES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files in which other tools keep a method that config.json does not mention."""
_OTHER_FIELDS = ("quantization", "compression_config")
"""Fields of config.json in which they do."""
_DEQUANTIZED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""Methods whose weights transformers turns into plain ones while it loads them."""
_PLAIN = {"F64", "F32", "F16", "BF16", "BOOL"}
_MASKS = re.compile(r"(position_ids|attn\.bias|attention\.bias|masked_bias)$")
"""Whole numbers that old checkpoints hold beside their weights."""


def quantization(config: Any) -> Any:
    """What a configuration says about quantised weights; None if they are plain."""
    own = getattr(config, "quantization_config", None)
    return getattr(config.get_text_config(), "quantization_config", None) if own is None else own


def prepare(config: Any, directory: Path) -> None:
    """Sees to it that quantised weights will be decoded; asks for nothing that is not local.

    Args:
        config: The model's ``PretrainedConfig``, told to decode where it has the choice.
        directory: Of its small files.

    Raises:
        InputError: They would not be decoded; without the model's name.
    """
    settings = quantization(config)
    if settings is None:
        if (how := _noted_elsewhere(config, directory)) is not None:
            raise InputError(
                f"{how}: quantised weights that transformers does not decode: {ADVICE}"
            )
        return
    if not isinstance(settings, dict):
        raise InputError(
            f"quantization_config: an object expected, got {settings!r:.100}: {ADVICE}"
        )
    if getattr(config, "quantization_config", None) is None:
        raise InputError(f"text_config.quantization_config: {ADVICE}")
    method = settings.get("quant_method")
    if method in _DEQUANTIZED:
        config.quantization_config = {**settings, "dequantize": True}
    if reason := _undecodable(config.quantization_config):
        raise InputError(f"quantization_config: quant_method {method!r}: {reason}: {ADVICE}")


def _noted_elsewhere(config: Any, directory: Path) -> str | None:
    for name in _OTHER_FIELDS:
        if getattr(config, name, None):
            return f"config.json: {name}"
    return next((name for name in _NOTES if (directory / name).is_file()), None)


def _undecodable(settings: dict[str, Any]) -> str | None:
    """Why transformers as installed here does not decode a method, or None."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        if not AutoHfQuantizer.supports_quant_method(settings):
            return "unknown to transformers"
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # each method's own package checks what it is given in its own way
        return one_line(error)
    return None


def check_stored(files: Sequence[Path]) -> None:
    """Refuses packed numbers among weights that nothing says are quantised.

    Args:
        files: Safetensors files.

    Raises:
        InputError: A tensor is stored in an 8-bit or whole-number type; without the model's name.
        SafetensorError: A file is damaged.
    """
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                kind = tensors.get_slice(name).get_dtype()
                if kind not in _PLAIN and not _MASKS.search(name):
                    raise InputError(
                        f"{file.name}: {name} is stored as {kind}, and config.json names no "
                        f"quantization_config by which to decode it: {ADVICE}"
                    )
