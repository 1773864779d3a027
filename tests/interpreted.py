"""Running a test module's kernels in Triton's interpreter, and the paged cache they read."""

import functools
import inspect
import os
import subprocess
import sys
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def search_builtins_once() -> None:
    """Halves the interpreter's time, which goes through ``triton.language`` at each function call.

    There it replaces the compiler's builtins. Which names they have does not change.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(owner: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    def patch_builtins(owner: Any, builder: Any, scope: Any) -> None:
        names = builtins(owner)
        if not names or not is_builtin(getattr(owner, names[0])):
            return  # The caller has replaced all of them.
        for name in names:
            interpreter._patch_attr(owner, name, getattr(owner, name), builder, scope)

    vars(interpreter)["_patch_builtin"]  # fails loudly if Triton moves it
    interpreter._patch_builtin = patch_builtins


if INTERPRETED:
    search_builtins_once()


def assert_passes_interpreted(test_file: str) -> None:
    """Runs the module's interpreted tests in a process of their own.

    Triton must be interpreted from its import on, and in this process vLLM has imported it.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", test_file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def paged(rows: torch.Tensor, pages: torch.Tensor, page_size: int) -> torch.Tensor:
    """Lays rows out as ``[num_pages, page_size, num_kv_heads, head_dim]``; free slots are NaN."""
    cache = rows.new_full((int(pages.max()) + 1, page_size, *rows.shape[1:]), torch.nan)
    positions = torch.arange(len(rows), device=rows.device)
    cache[pages[positions // page_size].long(), positions % page_size] = rows
    return cache
