"""vLLM's own arguments, for an engine that is driven instead of served."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from vllm_afbs.backends.driven import EXTENSION
from vllm_afbs.check.layers import check_directory, parse_serve_arguments
from vllm_afbs.check.refusals import RefusedError

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


def parse(arguments: Sequence[str]) -> tuple[EngineArgs, list[str]]:
    """Reads what follows ``vllm serve``.

    Args:
        arguments: The model, and any arguments of ``vllm serve``.

    Returns:
        The engine's arguments, and the names of those that were given and are not used.

    Raises:
        RefusedError: vLLM does not accept them, or a driven engine cannot have one.
    """
    given = parse_serve_arguments(arguments)
    _check(given)
    given = parse_serve_arguments([*arguments, "--attention-backend", "AFBS"])
    usual = parse_serve_arguments([given.model])
    names = {each.name for each in fields(EngineArgs)}
    changed = {name for name, value in vars(given).items() if value != vars(usual).get(name)}
    taken = FORCED | _PASSED_OVER
    unused = sorted(
        name
        for name in changed - {"model", "model_tag", "attention_backend"}
        if name not in names or (name in taken and getattr(given, name) != taken[name])
    )
    for name, value in taken.items():
        if name in names:
            setattr(given, name, value)
    return EngineArgs.from_cli_args(given), [f"--{name.replace('_', '-')}" for name in unused]


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
