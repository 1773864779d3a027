"""Loading a model's weights with an attention function of our own."""

from typing import Any

import torch
from safetensors import SafetensorError

from vllm_afbs.tuning.device import compute_device
from vllm_afbs.tuning.model import InputError, SourceModel, one_line


def load_weights(model: SourceModel, attention: str, *, with_head: bool) -> torch.nn.Module:
    """Loads a decoder, on a GPU if there is one.

    Args:
        model: The model.
        attention: Name of a registered attention function of transformers.
        with_head: Whether to load the language model's head too, not the decoder's body alone.

    Raises:
        InputError: The weights cannot be read, or some are missing.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    # The load report would list the head's weights as unused, which is right for the body.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = compute_device()
    kind: Any = AutoModelForCausalLM if with_head else AutoModel
    try:
        loaded, report = kind.from_pretrained(
            model.directory(),
            config=model.config,
            # bf16 as when served, but CPUs without bf16 units are a hundred times slower in it.
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{model.name}: cannot load the weights: {one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        # transformers would replace them with random numbers and go on.
        raise InputError(f"{model.name}: the weights lack {missing[0]} ({len(missing)} missing)")
    return loaded.eval().to(device)  # type: ignore[no-any-return]
