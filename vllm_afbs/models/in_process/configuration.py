"""Reading a model's configuration, with the changes that ``vllm serve --hf-overrides`` makes."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_afbs.errors import InputError, one_line

_POSITIONS_INCLUDE_FACTOR = (
    "default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling",
)  # fmt: skip
"""Kinds of rotary embeddings whose ``max_position_embeddings`` vLLM takes as it is."""


_COUNTS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
    "intermediate_size", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_MOST = {"num_hidden_layers": 10_000}
_MOST_OTHERS = 2**31
_OBJECTS = ("rope_parameters", "rope_scaling", "quantization_config", "text_config")
_LISTS = ("architectures", "layer_types")


def read_config(directory: Path, overrides: Mapping[str, Any]) -> Any:
    """Reads config.json.

    Args:
        directory: Holds it.
        overrides: Fields to set in it, as vLLM sets them.

    Returns:
        A ``PretrainedConfig``.

    Raises:
        InputError: It cannot be read, or a field is wrong; without the model's name.
    """
    from transformers import AutoConfig

    _check_kinds(_read_json(directory / "config.json"), "config.json")
    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # each of hundreds of kinds of models reads its fields its own way
        raise InputError(f"cannot read config.json: {one_line(error)}") from None
    if overrides:
        _check_kinds(overrides, "--hf-overrides")
        try:
            _override(config, overrides)
        except Exception as error:
            raise InputError(f"--hf-overrides: {one_line(error)}") from None
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read config.json: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read config.json: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise InputError("config.json: a JSON object expected")
    return fields


def _check_kinds(fields: Mapping[str, Any], source: str) -> None:
    """Refuses fields of another kind than every decoder's: transformers names few of them."""
    for name, value in fields.items():
        if value is None and name != "model_type":
            continue
        most = _MOST.get(name, _MOST_OTHERS)
        is_count = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        if name in _COUNTS and not is_count:
            expected = f"a whole number from 1 to {most}"
        elif name == "model_type" and not isinstance(value, str):
            expected = "a name"
        elif name in _OBJECTS and not isinstance(value, dict):
            expected = "an object"
        elif name in _LISTS and not (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            expected = "a list of names"
        else:
            continue
        raise InputError(f"{source}: {name}: {expected} expected, got {value!r:.100}")


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    """Does what vLLM does, in its order: a rotary embedding that is given replaces the old one."""
    text = config.get_text_config()
    objects = {name: value for name, value in overrides.items() if isinstance(value, dict)}
    config.update({name: value for name, value in overrides.items() if name not in objects})
    for part in (config, text):
        if getattr(part, "rope_parameters", None):
            part.standardize_rope_params()
            part.validate_rope()
    for name, value in objects.items():
        _set(config, name, value)
    if _names_rope(objects):
        rope = text.rope_parameters
        kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
        for name in ("rope_type", "rope_theta"):
            if any(name not in each for each in kinds):
                raise ValueError(
                    f"rope_parameters: {name} expected: vLLM takes none from config.json"
                )
        text.validate_rope()
    for part in (config, text):
        if hasattr(part, "validate"):
            part.validate()


def _names_rope(objects: Mapping[str, Any]) -> bool:
    return any(
        name in ("rope_parameters", "rope_scaling")
        or (isinstance(value, dict) and _names_rope(value))
        for name, value in objects.items()
    )


def _set(target: Any, name: str, value: Any) -> None:
    """Sets a field; of another configuration inside it, the named fields alone."""
    from transformers import PretrainedConfig

    inner = getattr(target, name, None)
    if isinstance(inner, PretrainedConfig):
        for field, each in value.items():
            if isinstance(each, dict):
                _set(inner, field, each)
            else:
                setattr(inner, field, each)
    else:
        setattr(target, name, value)


def positions(text: Any) -> int:
    """Longest context that a model's positions allow, in tokens, as vLLM derives it.

    Args:
        text: The text part of a ``PretrainedConfig``.

    Raises:
        InputError: The configuration does not say; without the model's name.
    """
    named = getattr(text, "max_position_embeddings", None)
    if not isinstance(named, int) or isinstance(named, bool) or named < 1:
        raise InputError(
            "config.json: max_position_embeddings: a whole number from 1 on expected, got "
            f"{named!r:.100}"
        )
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type") in (None, *_POSITIONS_INCLUDE_FACTOR):
        return named
    factor = rope.get("factor")
    if factor is None:
        return named
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise InputError(
            f"config.json: rope_parameters.factor: a number above 0 expected, got {factor!r:.100}"
        )
    return int(min(named * factor, sys.maxsize))
