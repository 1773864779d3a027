"""Loading a model's weights with an attention function of our own."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from vllm_afbs.errors import InputError, one_line
from vllm_afbs.models.in_process import quantised
from vllm_afbs.models.in_process.source import SourceModel
from vllm_afbs.tuning import memory
from vllm_afbs.tuning.device import compute_device


def load_weights(model: SourceModel, attention: str, *, with_head: bool) -> torch.nn.Module:
    """Loads a decoder, on a GPU if there is one.

    Args:
        model: The model.
        attention: Name of a registered attention function of transformers.
        with_head: Whether to load the language model's head too, not the decoder's body alone.

    Raises:
        InputError: The weights cannot be read or do not fit into memory, or they are not exactly
            what the configuration describes.
    """
    with memory.explained(
        f"loading the weights of {model.name}",
        "a machine with more memory expected, or a smaller model",
    ):
        loaded = _load(model, attention, with_head)
        return loaded.eval().to(compute_device())


def _load(model: SourceModel, attention: str, with_head: bool) -> torch.nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    # The load report would list the head's weights as unused, which is right for the body.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = model.weight_files()
    # As it will be served; CPUs without bf16 units are a hundred times slower in it.
    dtype = torch.bfloat16 if compute_device().type == "cuda" else torch.float32
    kind: Any = AutoModelForCausalLM if with_head else AutoModel
    try:
        if quantised.quantization(model.config) is None:
            quantised.check_stored(files)
        loaded, report = kind.from_pretrained(
            model.directory(),
            config=copy.deepcopy(model.config),  # loading writes into it
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name one below, not all
        )
        _check_report(report, [] if with_head else _head_modules(model))
        _check_decoded(loaded, dtype)
    except InputError as error:
        raise InputError(f"{model.name}: {error}") from None
    except Exception as error:  # what a file can hold, transformers' model classes raise
        if memory.exhausted(error):
            raise
        advice = f": {quantised.ADVICE}" if quantised.quantization(model.config) else ""
        raise InputError(
            f"{model.name}: cannot load the weights: {one_line(error)}{advice}"
        ) from None
    return loaded  # type: ignore[no-any-return]


def _check_report(report: Mapping[str, Any], left_out: list[str]) -> None:
    """Refuses weights that the loader does not account for.

    Args:
        report: The loader's.
        left_out: Modules whose weights are rightly not loaded.
    """
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise InputError(f"the weights lack {missing[0]} ({len(missing)} missing)")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise InputError(
            f"the weights hold {name} of shape {list(stored)}, {list(expected)} expected by "
            "config.json"
        )
    others = sorted(
        name for name in report["unexpected_keys"] if name.rpartition(".")[0] not in left_out
    )
    if others:
        raise InputError(
            f"the weights hold {others[0]}, which the model that config.json describes does not "
            f"have ({len(others)} such); if they are quantised, {quantised.ADVICE}"
        )


def _head_modules(model: SourceModel) -> list[str]:
    """Modules of the whole language model outside its body."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        whole: Any = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    body = f"{whole.base_model_prefix}."
    return [name for name, _ in whole.named_modules() if name and not f"{name}.".startswith(body)]


def _check_decoded(loaded: torch.nn.Module, dtype: torch.dtype) -> None:
    """Refuses weights that were left in 8 bits where they were to be decoded."""
    for name, weight in loaded.named_parameters():
        if weight.is_floating_point() and weight.dtype.itemsize == 1:
            raise InputError(
                f"{name} is {weight.dtype} after loading, {dtype} expected: {quantised.ADVICE}"
            )
