"""Which plugins of vLLM load, in environments where ours or another's does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributions import CHECKOUT, link, required_by
from vllm_afbs.demo.server import SERVER_ENVIRONMENT

UNSET = ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "VLLM_LOGGING_LEVEL", "VLLM_AFBS_PROFILE")


def run_check(
    *arguments: object,
    python: str | Path = sys.executable,
    path: Path | None = None,
    cwd: Path = CHECKOUT,
    **env: str,
) -> tuple[int, list[str], str]:
    paths = [str(path), str(CHECKOUT)] if path else [str(CHECKOUT)]
    inherited = {name: value for name, value in os.environ.items() if name not in UNSET}
    done = subprocess.run(
        [python, "-m", "vllm_afbs.check", *map(str, arguments)],
        env={**inherited, **SERVER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths), **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS='other' does not name it: add afbs"),
        ("VLLM_PLUGINS", "", "VLLM_PLUGINS='' does not name it: add afbs"),
        ("VLLM_TARGET_DEVICE", "cpu", "VLLM_TARGET_DEVICE=cpu makes vLLM take its own"),
    ],
)
def test_a_variable_that_keeps_our_plugin_out_is_named(
    variable: str, value: str, reason: str, tmp_path: Path
) -> None:
    arguments = ("--model", tmp_path, "--attention-backend=afbs")
    status, lines, _ = run_check(*arguments, **{variable: value})
    assert status == 1
    assert lines[-1].startswith(f"off: platform plugin afbs: does not load: {reason}")
    assert not any("layers" in line for line in lines)


def test_named_in_the_variable_everything_of_ours_loads() -> None:
    status, lines, _ = run_check(VLLM_PLUGINS="other,afbs")
    assert status == 0
    assert {"platform plugin afbs: loads", "endpoint plugin afbs: loads"} <= set(lines)
    assert lines[-1].startswith("on: ")


def test_a_plugin_of_others_that_fails_is_told(tmp_path: Path) -> None:
    information = tmp_path / "broken-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[vllm.general_plugins]\nbroken = no_such:it\n")
    status, lines, _ = run_check(path=tmp_path)
    assert status == 0
    failed = "ModuleNotFoundError: No module named 'no_such'"
    assert f"general plugin broken: does not load: {failed}" in lines


def test_our_plugin_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError('lib.so:\\nmissing')\n")
    status, lines, _ = run_check(path=tmp_path)
    assert status == 1
    reason = "platform plugin afbs: does not load: ImportError: lib.so: missing"
    assert reason in lines
    assert lines[-1].startswith(f"off: {reason}")


def test_a_bare_checkout_is_told(tmp_path: Path) -> None:
    """An environment with vLLM, and our sources on ``PYTHONPATH`` alone.

    The checkout itself may be installed in place, which leaves its metadata beside the sources.
    """
    bare = tmp_path / "checkout"
    bare.mkdir()
    (bare / "vllm_afbs").symlink_to(CHECKOUT / "vllm_afbs")
    create = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"]
    subprocess.run(create, check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    link(required_by("vllm").values(), packages)
    status, lines, _ = run_check(
        python=tmp_path / "venv" / "bin" / "python", cwd=bare, PYTHONPATH=str(bare)
    )
    assert status == 1
    assert lines[-1].startswith("off: vllm-afbs is importable here but not installed")
    assert not any("plugin afbs" in line for line in lines)
