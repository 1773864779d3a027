"""Wheels and source distributions of the checkout, and what installed distributions require."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = ("vllm_afbs", "kernels", "tuning", "pyproject.toml", "README.md", "LICENSE")


def clean_environment() -> dict[str, str]:
    """This process's environment, without what would bring in the checkout or an index."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PIP_") and name != "PYTHONPATH"
    }
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PYTHONSAFEPATH": "1"}


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command that has to succeed; its output is the failure's message."""
    result = subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_sources(root: Path) -> Path:
    """Copies the sources, links kept: builds leave files behind, and not in the checkout."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, root / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, root / name)
    return root


def build(kind: Literal["sdist", "wheel"], source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", out, source, cwd=out)
    (built,) = out.iterdir()
    return built


def required_by(root: str) -> dict[str, Distribution]:
    """An installed distribution and all that it requires, directly or not, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(root)]
    while queue:
        wanted = queue.pop()
        name, extras = str(canonicalize_name(wanted.name)), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = distribution(wanted.name)
        for text in found[name].requires or []:
            each = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *extras)]
            if each.marker is None or any(map(each.marker.evaluate, environments)):
                queue.append(each)
    return found


def link(distributions: Iterable[Distribution], target: Path) -> None:
    """Links the folders and files of installed distributions into a folder, scripts excepted."""
    for each in distributions:
        for top in {file.parts[0] for file in each.files or []} - {"..", "__pycache__"}:
            source = Path(str(each.locate_file(top)))
            if not (target / top).exists():
                (target / top).symlink_to(source, target_is_directory=source.is_dir())
