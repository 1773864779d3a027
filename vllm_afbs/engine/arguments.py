"""vLLM's own arguments, for an engine that is driven instead of served."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest

from vllm_afbs.backends.driven import EXTENSION
from vllm_afbs.check.layers import check_directory, parse_serve_arguments
from vllm_afbs.check.refusals import RefusedError
from vllm_afbs.engine import adapters

FORCED = {
    "enforce_eager": True,  # graphs would pass the recorded layers by
    "enable_prefix_caching": False,  # cached rows would never pass them
    "worker_extension_cls": EXTENSION,
    "disable_log_stats": True,
}
"""What a driven engine has to have."""
_PASSED_OVER: dict[str, Any] = {
    "speculative_config": None,
    "kv_transfer_config": None,
    "enable_lora": False,
    "lora_modules": None,
    "data_parallel_size": 1,
    "enable_sleep_mode": False,
    "additional_config": {},
}
"""Arguments that a driven engine does without: none changes the base model's Q, K and V."""
_WITH_ADAPTERS: dict[str, Any] = {
    "enable_lora": True,
    "additional_config": {"afbs": {"lora": "validated"}},
}
"""What it has to have to run LoRA adapters; candidate profiles say of each that it may run."""


@dataclass(frozen=True)
class Parsed:
    """What follows ``vllm serve``, for a driven engine.

    Attributes:
        engine: The engine's arguments.
        unused: Names of arguments that were given and are not used.
        adapters: The LoRA adapters of ``--lora-modules``, in their order; vLLM numbers them from 1.
    """

    engine: EngineArgs
    unused: list[str]
    adapters: list[LoRARequest]


def parse(arguments: Sequence[str], with_adapters: bool = False) -> Parsed:
    """Reads what follows ``vllm serve``.

    Args:
        arguments: The model, and any arguments of ``vllm serve``.
        with_adapters: Whether LoRA adapters are used.

    Raises:
        RefusedError: vLLM does not accept them, or a driven engine cannot have one.
    """
    given = parse_serve_arguments(arguments)
    _check(given)
    requested = adapters.requests(given) if with_adapters else []
    given = parse_serve_arguments([*arguments, "--attention-backend", "AFBS"])
    usual = parse_serve_arguments([given.model])
    names = {each.name for each in fields(EngineArgs)}
    changed = {name for name, value in vars(given).items() if value != vars(usual).get(name)}
    taken = FORCED | _PASSED_OVER
    if requested:
        changed.discard("lora_modules")
        taken |= _WITH_ADAPTERS
    unused = sorted(
        name
        for name in changed - {"model", "model_tag", "attention_backend"}
        if name not in names or (name in taken and getattr(given, name) != taken[name])
    )
    for name, value in taken.items():
        if name in names:
            setattr(given, name, value)
    names_unused = [f"--{name.replace('_', '-')}" for name in unused]
    return Parsed(EngineArgs.from_cli_args(given), names_unused, requested)


def _check(given: Namespace) -> None:
    """Refuses what cannot be passed over."""
    check_directory(given.model)
    if given.tokenizer not in (None, given.model) and not Path(given.tokenizer).is_dir():
        raise RefusedError(f"--tokenizer: a directory expected, got {given.tokenizer}")
    backend = getattr(given, "attention_backend", None)
    if backend is not None and _name(backend).upper() != "AFBS":
        raise RefusedError(f"--attention-backend: afbs expected, got {_name(backend)}")
    if given.load_format == "dummy":
        raise RefusedError("--load-format: the model's weights expected, got dummy")


def _name(backend: Any) -> str:
    return str(getattr(backend, "name", backend))
