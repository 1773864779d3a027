"""The check of vLLM's versions: the installed one passes, and one that lacks something does not."""

import ast
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests import versions
from vllm_afbs import compat


def test_the_installed_version_has_what_we_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main([]) == 0
    assert "known: 0 problems" in capsys.readouterr().out
    assert len(set(versions.imports())) > 20


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The files of the installed version that the check reads."""
    tree, read = versions.Tree(versions.installed()), {}
    for module, name in [*versions.imports(), ("vllm", ""), ("vllm.v1.attention.backend", "")]:
        for each in (module, f"{module}.{name}", "vllm.distributed.parallel_state"):
            path = each.replace(".", "/")
            for file in (f"{path}.py", f"{path}/__init__.py"):
                if (text := tree.read(file)) is not None:
                    read[file] = text
    read["vllm/_version.py"] = "__version__ = version = '0.99.0'"
    return read


BACKENDS = "vllm/v1/attention/backends"


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("vllm/_version.py", "0.99", "0.99", None),
        (f"{BACKENDS}/registry.py", "AttentionBackendEnum", "Renamed", "no AttentionBackendEnum"),
        (f"{BACKENDS}/flash_attn.py", "    max_num_splits: int = 0", "    tree_mask: int = 0",
         "new field tree_mask"),
        (f"{BACKENDS}/flash_attn.py", "        sinks: torch.Tensor | None = None,",
         "        sinks: torch.Tensor | None = None, qk_clip: int = 0,", "new argument qk_clip"),
        (f"{BACKENDS}/flash_attn.py", "        output_block_scale: torch.Tensor | None = None,",
         "        output_block_scale: torch.Tensor | None = None, q_descale: int = 0,",
         "forward has a new argument q_descale"),
        ("vllm/v1/attention/backend.py", "seq_lens_cpu_upper_bound: ", "lens: ",
         "CommonAttentionMetadata has no seq_lens_cpu_upper_bound"),
        ("vllm/distributed/parallel_state.py", "get_tensor_model_parallel_rank", "renamed",
         "vllm.distributed has no get_tensor_model_parallel_rank"),
        ("vllm/lora/worker_manager.py", "def _load_adapter", "def _load", "no _load_adapter"),
        ("vllm/platforms/cpu.py", None, None, "module vllm.platforms.cpu is missing"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_wheel_that_lacks_something_is_told(
    file: str, old: str | None, new: str, problem: str | None, files: dict[str, str],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = dict(files)
    if old is None:
        del changed[file]
    else:
        assert old in files[file]
        changed[file] = files[file].replace(old, new)
        ast.parse(changed[file])
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in changed.items():
            archive.writestr(name, text)
    assert versions.main([str(wheel)]) == (problem is not None)
    printed = capsys.readouterr().out
    assert printed.startswith(f"vLLM 0.99.0 ({wheel}), not among the known versions: ")
    assert (problem or "0 problems") in printed
    assert "0.99.0" not in compat.KNOWN_VERSIONS


def test_layers_are_grouped_by_the_builder_where_vllm_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From 0.33 on a platform, or a model, may group its layers in its own way."""
    config: Any = SimpleNamespace()
    specs = {"a": 1, "b": 2}
    monkeypatch.setattr("vllm.v1.core.kv_cache_utils.get_kv_cache_groups", lambda *_: ["0.32"])
    assert list(compat._group_layers(config, specs)) == ["0.32"]

    asked = []
    builder = SimpleNamespace(get_kv_cache_groups=lambda *given: asked.append(given) or ["0.33"])
    newer: Any = ModuleType("kv_cache_config_builder")
    newer.get_kv_cache_config_builder = lambda given: builder if given is config else None
    monkeypatch.setitem(sys.modules, "vllm.v1.core.kv_cache_config_builder", newer)
    assert list(compat._group_layers(config, specs)) == ["0.33"]
    assert asked == [(config, specs)]
