"""A rotary embedding's parameters: read off a configuration, and compared by what they mean."""

from collections.abc import Mapping
from typing import Any

_RENAMED_TYPES = {"su": "longrope", "mrope": "default"}
_WHERE_ABSENT = {"rope_type": "default", "partial_rotary_factor": 1.0}
"""What a parameter is where a configuration does not name it."""


def rope_parameters(config: Any) -> dict[str, Any]:
    """The parameters as configured, sorted by name, those that are null left out.

    Of a model whose kinds of layers have their own, those of layers with full attention.

    Args:
        config: The text part of a ``PretrainedConfig``.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        theta = getattr(config, "rope_theta", None)
        parameters = {"rope_theta": theta, **(getattr(config, "rope_scaling", None) or {})}
    parameters = _of_full_attention(parameters)
    return {name: value for name, value in sorted(parameters.items()) if value is not None}


def rope_difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Name of the first parameter that differs in meaning; None if all mean the same.

    ``type`` is the old name of ``rope_type``, and what is absent has its usual value. Of parameters
    by kind of layer, those of layers with full attention are compared.
    """
    left, right = _meaning(mine), _meaning(theirs)
    names = sorted({*left, *right}, key=lambda name: (not name.endswith("rope_type"), name))
    return next((name for name in names if left.get(name) != right.get(name)), None)


def rope_value(parameters: Mapping[str, Any], name: str) -> Any:
    """A parameter by the name that ``rope_difference`` gives it; None if it is absent."""
    return _meaning(parameters).get(name)


def _of_full_attention(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of layers with full attention; all if they are not by kind of layer."""
    full = parameters.get("full_attention")
    return full if isinstance(full, Mapping) else parameters


def _meaning(parameters: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _of_full_attention(parameters)
    found = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in parameters.items()
        if name != "type" and value is not None
    }
    kind = parameters.get("rope_type") or parameters.get("type")
    if isinstance(kind, str):
        found["rope_type"] = _RENAMED_TYPES.get(kind, kind)
    for name, value in _WHERE_ABSENT.items():
        if found.get(name) == value:
            del found[name]
    return found
