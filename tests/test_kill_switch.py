"""The kill switch between processes."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vllm_afbs.observability import kill_switch, metrics


def shown() -> float:
    values = [
        sample.value
        for family in metrics.read()
        for sample in family.samples
        if sample.name == "vllm_afbs_enabled"
    ]
    (value,) = values
    return value


def elsewhere(code: str) -> None:
    subprocess.run(
        [sys.executable, "-c", f"from vllm_afbs.observability import kill_switch; {code}"],
        env=dict(os.environ),
        check=True,
    )


@pytest.mark.parametrize("variable", [metrics.DIRECTORY_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"])
def test_what_one_process_switches_all_others_see(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "metrics"))
    worker = kill_switch.KillSwitch()
    assert worker.is_enabled()
    assert kill_switch.disabled_since() is None
    assert shown() == 1

    elsewhere("kill_switch.set_enabled(False)")
    assert shown() == 0  # at once, and not only when a worker comes to look
    assert not worker.is_enabled()
    assert not kill_switch.KillSwitch().is_enabled()  # a worker that was restarted
    elsewhere("kill_switch.set_enabled(False)")
    since = kill_switch.disabled_since()
    assert since is not None
    assert datetime.now(UTC) - since < timedelta(minutes=5)

    elsewhere("kill_switch.set_enabled(True)")
    assert shown() == 1
    assert worker.is_enabled()

    # By hand, where there are no routes.
    kill_switch.switch_file().touch()
    assert not worker.is_enabled()
    assert shown() == 0
