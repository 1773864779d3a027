"""The rooms of the package, and which room may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_afbs

PACKAGE = Path(vllm_afbs.__file__).parent
ROOT = PACKAGE.parent
NAME = vllm_afbs.__name__

ROOMS: dict[str, set[str]] = {
    "kernels": set(),
    "compat": set(),
    "files": set(),
    "errors": set(),
    "captures": {"errors"},
    "profile": {"files"},
    "serving": {"compat", "kernels", "profile"},
    "observability": {"compat", "files", "kernels", "profile", "serving"},
    "backends": {"captures", "compat", "kernels", "profile", "serving", "observability"},
    "plugin": {"compat", "observability.metrics"},
    "tuning": {"captures", "errors", "files", "kernels", "profile"},
    "models": {"captures", "errors", "kernels", "profile", "tuning"},
    "commands": {"files"},
    "check": {"commands", "compat", "files", "profile", "serving"},
    "engine": {
        "backends.driven", "captures", "check", "commands", "compat", "errors", "kernels",
        "models", "observability.metric_files", "profile", "serving.settings", "tuning.engine",
    },
    "cost_models": {"backends.cuda.dispatch", "tuning.cost"},
    "tune": {"commands", "cost_models", "engine", "errors", "files", "profile", "tuning"},
    "evaluate": {
        "commands", "engine", "errors", "files", "kernels", "models", "profile", "serving.plan",
        "tuning",
    },
    "demo": {"commands", "evaluate.divergence", "files", "profile", "serving.settings"},
}  # fmt: skip
"""From the lowest floor up: the rooms, or modules in them, that each room imports.

A room is a folder or a single module of the package. It may import only rooms above it in this
table, so there is no cycle.
"""

CALLS_VLLM = {"compat", "backends", "check", "engine", "plugin"}
"""Rooms that import vLLM when they run. The others may name its types for the type checker."""

MAX_LINES = 350
MAX_KERNEL_LINES = 600


def modules(room: str) -> Iterator[Path]:
    """The files of a room. In a checkout some rooms are links, which ``rglob`` does not enter."""
    folder = PACKAGE / room
    if folder.is_dir():
        yield from folder.resolve().rglob("*.py")
    else:
        yield folder.with_suffix(".py")


def room_names() -> set[str]:
    """The rooms that there are."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imported(tree: ast.Module, at_run_time: bool = False) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever it does so.

    Args:
        tree: The module.
        at_run_time: Whether to leave out what is imported for the type checker only.
    """
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for each in node.body for inner in ast.walk(each))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an absolute import expected"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def targets(room: str, at_run_time: bool = False) -> set[str]:
    """What the files of a room import: dotted names, without the package's own."""
    return {
        name.removeprefix(f"{NAME}.")
        for path in modules(room)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), at_run_time)
        if name != NAME
    }


def is_part_of(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def test_every_room_is_in_the_table() -> None:
    assert room_names() == set(ROOMS)


def test_the_table_has_floors() -> None:
    below: set[str] = set()
    for room, allowed in ROOMS.items():
        assert {place.split(".")[0] for place in allowed} <= below, room
        below.add(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_says(room: str) -> None:
    ours = {*ROOMS, "benchmarks", "deploy", "tests"} - {room}
    names = {name for name in targets(room) if name.split(".")[0] in ours}
    for name in names:
        assert any(is_part_of(name, place) for place in ROOMS[room]), f"{room} imports {name}"
    for place in ROOMS[room]:
        assert any(is_part_of(name, place) for name in names), f"{room} imports no {place}"


def test_only_few_rooms_call_vllm() -> None:
    calling = {room for room in ROOMS if any(is_part_of(n, "vllm") for n in targets(room, True))}
    assert calling == CALLS_VLLM


@pytest.mark.parametrize("room", ROOMS)
def test_files_are_short(room: str) -> None:
    limit = MAX_KERNEL_LINES if room == "kernels" else MAX_LINES
    for path in modules(room):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path.name


def test_imports_are_found_wherever_they_are() -> None:
    """The other tests would pass if nothing were found."""
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from vllm.config import VllmConfig\n"
        "def late():\n    import vllm_afbs.tuning.run\n"
    )
    always = {"typing.TYPE_CHECKING", "vllm_afbs.tuning.run"}
    assert set(imported(tree, at_run_time=True)) == always
    assert set(imported(tree)) == always | {"vllm.config.VllmConfig"}
