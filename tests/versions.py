"""Whether versions of vLLM have what vllm_afbs takes from it: ``make versions VLLM='A.whl B/'``.

Reads source and imports nothing, so a build for CUDA can be checked on any machine, and by any
Python. What vLLM does with it, only a run tells; versions that were tried are in ``compat``.
"""

import argparse
import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from vllm_afbs import compat
from vllm_afbs.serving import eligibility

PACKAGE = Path(compat.__file__).parent
ATTENTION = "vllm.v1.attention"
PARENTS = {
    f"{ATTENTION}.backends.cpu_attn": "CPUAttention",
    f"{ATTENTION}.backends.flash_attn": "FlashAttention",
}
"""Modules of the backends that ours derive from, with what their classes' names begin with."""

KNOWN_MASK_FIELDS = frozenset(
    {
        "dynamic_causal", "use_sdpa_prefill", "sdpa_attn_masks", "sdpa_start_loc", "encoder_cache",
        "use_cascade", "common_prefix_len", "cu_prefix_query_lens", "prefix_kv_lens",
        "suffix_kv_lens", "prefix_scheduler_metadata", "dcp_context_kv_lens",
        "mm_prefix_range_tensor", "mm_prefix_query_range_tensor", "rswa_prefix_lens", "rswa_window",
        "rswa_window_tensor",
    }
)  # fmt: skip
"""Fields of metadata that make a step dense where they are set, each read about."""

FORWARD_ARGUMENTS = frozenset(
    {
        "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale",
        "output_block_scale",
    }
)  # fmt: skip
"""Arguments of a layer's call that our ``forward`` names."""

COMMON_FIELDS = frozenset(
    {
        "query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound",
        "num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len", "block_table_tensor",
        "slot_mapping", "causal",
    }
)  # fmt: skip
"""What ``batch.restrict`` and the builders read of vLLM's own metadata."""


@dataclass(frozen=True)
class Tree:
    """vLLM's source: in a wheel, or in a directory that holds the package ``vllm``."""

    place: Path

    @cached_property
    def _wheel(self) -> zipfile.ZipFile | None:
        return zipfile.ZipFile(self.place) if self.place.is_file() else None

    def read(self, file: str) -> str | None:
        """The text of a file; None if there is none."""
        try:
            if self._wheel is not None:
                return self._wheel.read(file).decode()
            return (self.place / file).read_text(encoding="utf-8")
        except (KeyError, FileNotFoundError, NotADirectoryError):
            return None

    def module(self, name: str) -> ast.Module | None:
        """A module's syntax; None if there is none of this name."""
        path = name.replace(".", "/")
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if (text := self.read(file)) is not None:
                return ast.parse(text)
        return None

    def names(self, module_name: str) -> set[str]:
        """Names that a module has, those of modules that it imports whole included."""
        module = self.module(module_name)
        if module is None:
            return set()
        names = names_of(module)
        for node in module.body:
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and node.level < 2:
                inner = f"{module_name}.{node.module}" if node.level else str(node.module)
                names |= self.names(inner)
        return names

    @property
    def version(self) -> str:
        """What it says it is."""
        found = re.search(r"__version__ = version = '([^']+)'", self.read("vllm/_version.py") or "")
        return found[1] if found else "unknown"


def imports() -> Iterator[tuple[str, str]]:
    """Every module of vLLM's and name in it that our package imports, wherever it does so."""
    for folder in ("", "backends", "check", "engine", "observability", "profile", "serving"):
        for path in sorted((PACKAGE / folder).glob("**/*.py" if folder else "*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                    for alias in node.names:
                        yield str(node.module), alias.name


def names_of(module: ast.Module) -> set[str]:
    """Names that a module has: defined, assigned or imported, under whatever condition."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # names that a module loads when they are asked for
    return names


def class_of(module: ast.Module, name: str) -> ast.ClassDef | None:
    """A class of a module."""
    classes = (node for node in ast.walk(module) if isinstance(node, ast.ClassDef))
    return next((node for node in classes if node.name == name), None)


def fields_of(node: ast.ClassDef) -> set[str]:
    """Annotated names of a class's body: a dataclass's fields."""
    return {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def arguments_of(node: ast.ClassDef, method: str) -> set[str]:
    """Names of a method's arguments."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == method:
            every = (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)
            return {argument.arg for argument in every} - {"self"}
    return set()


def problems(tree: Tree) -> Iterator[str]:
    """What vllm_afbs takes from vLLM and this version has not, or has and we know nothing of."""
    if tree.module("vllm") is None:
        yield "no package vllm in it"
        return
    for module_name, name in sorted(set(imports())):
        if tree.module(module_name) is None:
            yield f"module {module_name} is missing"
        elif name not in tree.names(module_name) and not tree.module(f"{module_name}.{name}"):
            yield f"{module_name} has no {name}"
    yield from _unread_parts(tree)


def _unread_parts(tree: Tree) -> Iterator[str]:
    for module_name, prefix in PARENTS.items():
        module = tree.module(module_name)
        if module is None:
            continue
        metadata = class_of(module, f"{prefix}Metadata")
        impl = class_of(module, f"{prefix}Impl") or class_of(module, f"{prefix}BackendImpl")
        if metadata is None or impl is None:
            yield f"{module_name}: no {prefix}Metadata or no implementation"
            continue
        known = compat.HARMLESS_FIELDS | KNOWN_MASK_FIELDS
        for field in sorted(fields_of(metadata) - known):
            yield f"{module_name}: metadata has a new field {field}: steps that set it run dense"
        for name in sorted(arguments_of(impl, "__init__") - eligibility.KNOWN_ARGUMENTS):
            yield f"{module_name}: layers have a new argument {name}: those that set it run dense"
        for name in sorted(arguments_of(impl, "forward") - FORWARD_ARGUMENTS):
            yield f"{module_name}: forward has a new argument {name}: calls that pass it run dense"
    worker = tree.module("vllm.lora.worker_manager")
    manager = class_of(worker, "WorkerLoRAManager") if worker else None
    if manager is None or "lora_request" not in arguments_of(manager, "_load_adapter"):
        yield "vllm.lora.worker_manager: no _load_adapter: steps with LoRA adapters run dense"
    common = tree.module(f"{ATTENTION}.backend")
    found = class_of(common, "CommonAttentionMetadata") if common else None
    for field in sorted(COMMON_FIELDS - (fields_of(found) if found else set())):
        yield f"{ATTENTION}.backend: CommonAttentionMetadata has no {field}"


def installed() -> Path:
    """The directory that holds the vLLM which this Python imports."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Checks each place and prints a line for each problem, or one that there is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("places", nargs="*", type=Path, help="wheels, or directories with vllm/")
    status = 0
    for place in parser.parse_args(arguments).places or [installed()]:
        tree = Tree(place)
        found = list(problems(tree))
        release = tree.version.split("+")[0]
        tried = "known" if release in compat.KNOWN_VERSIONS else "not among the known versions"
        print(f"vLLM {tree.version} ({place}), {tried}: {len(found)} problems")
        for problem in found:
            print(f"  {problem}")
        status = status or int(bool(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
