"""The kill switch between the processes of servers: off is off, whatever happens to its file."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.switch_workers import workers
from vllm_afbs.observability import (
    instance,
    kill_switch,
    membership,
    metric_files,
    server_file,
)

WAIT_SECONDS = 20.0
DIRECTORIES = pytest.mark.parametrize(
    "variable", [instance.DIRECTORY_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"]
)


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "metrics"))


def shown() -> float:
    (value,) = [
        sample.value
        for family in metric_files.read()
        for sample in family.samples
        if sample.name == "vllm_afbs_enabled"
    ]
    return value


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@DIRECTORIES
def test_what_one_process_switches_all_others_see_and_acknowledge(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "metrics"))
    kill_switch.begin()
    assert kill_switch.count_acknowledged(True) == 0
    with workers(2) as started:
        assert [worker.first for worker in started] == [True, True]
        assert kill_switch.count_acknowledged(True) == 2
        assert kill_switch.read_state() == kill_switch.State(enabled=True)
        assert shown() == 1

        kill_switch.set_enabled(False)
        # The next step already: a worker does not wait for its thread to look.
        assert [worker.is_enabled() for worker in started] == [False, False]
        assert kill_switch.count_acknowledged(False) == 2
        assert shown() == 0
        since = kill_switch.read_state().disabled_since
        assert since is not None
        assert abs(datetime.now(UTC) - since) < timedelta(minutes=5)

        kill_switch.set_enabled(True)
        # Idle workers, which have no steps, acknowledge too.
        assert eventually(lambda: kill_switch.count_acknowledged(True) == 2)
        assert shown() == 1

        # By hand, where there are no routes.
        subprocess.run(
            f"echo off | tee {tmp_path}/metrics/afbs-switch-*", shell=True, check=True
        )  # fmt: skip
        assert not started[0].is_enabled()
        started[1].stop()
        assert kill_switch.count_acknowledged(False) == 1  # one that ended is not counted


def remove_the_file(directory: Path) -> None:
    kill_switch.switch_file().unlink()


def empty_the_file(directory: Path) -> None:
    kill_switch.switch_file().write_bytes(b"")


def garble_the_file(directory: Path) -> None:
    kill_switch.switch_file().write_bytes(b"\xff\xfe on")


def remove_all(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("clean", [remove_the_file, empty_the_file, garble_the_file, remove_all])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_cleaner_never_turns_sparse_on(
    enabled: bool, clean: Callable[[Path], None], tmp_path: Path
) -> None:
    kill_switch.begin()
    with workers(1) as started:
        if not enabled:
            kill_switch.set_enabled(False)
            assert not started[0].is_enabled()
        clean(tmp_path / "metrics")
        assert not started[0].is_enabled()
        assert not kill_switch.read_state().enabled
        assert eventually(lambda: kill_switch.count_acknowledged(False) == 1)
        with workers(1) as restarted:
            assert not restarted[0].first
        kill_switch.begin()  # vLLM checks a configuration several times
        assert not started[0].is_enabled()

        kill_switch.set_enabled(True)
        assert started[0].is_enabled()


def test_a_file_that_is_on_is_kept_from_cleaners_by_age(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switch = kill_switch.KillSwitch()
    file = kill_switch.switch_file()
    os.utime(file, (1, 1))
    switch.keep()
    assert file.stat().st_mtime == 1
    monkeypatch.setattr(server_file, "REFRESH_SECONDS", 0.0)
    switch.keep()
    assert time.time() - file.stat().st_mtime < 60
    kill_switch.set_enabled(False)  # when it was switched off is to be seen
    os.utime(file, (1, 1))
    switch.keep()
    assert file.stat().st_mtime == 1


SERVER = """
import sys
from vllm_afbs.observability import kill_switch, metrics
metrics.publish()
switch = kill_switch.KillSwitch()
print(switch.is_enabled(), flush=True)
for line in sys.stdin:
    if line.strip():
        kill_switch.set_enabled(line.strip() == "on")
    print(switch.is_enabled(), flush=True)
"""


class Server:
    """A server of its own that this process starts by a command line."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            command or (sys.executable, "-c", SERVER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer()

    def _answer(self) -> bool:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip() == "True"

    def ask(self, switch: str = "") -> bool:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{switch}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@DIRECTORIES
def test_servers_that_share_a_directory_do_not_switch_each_other(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "metrics"))
    own = kill_switch.KillSwitch()  # of this process, whose environment the servers inherit
    one, other = Server(), Server()
    try:
        assert not one.ask("off")
        assert other.ask()
        assert own.is_enabled()
        assert shown() == 1
        kill_switch.set_enabled(False)
        assert other.ask()
        assert one.ask("on")
        left = {file.name for file in (tmp_path / "metrics").glob("afbs-switch-*")}
        assert len(left) == 3
    finally:
        one.stop()
        other.stop()
    # The next server removes what the ended ones left, and nothing of one that runs.
    third = Server()
    left = {file.name for file in (tmp_path / "metrics").glob("afbs-s*")}
    third.stop()
    assert len([name for name in left if name.startswith("afbs-switch-")]) == 2
    assert kill_switch.switch_file().name in left


RAY_DRIVER = """
import os, sys, time
import ray
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
# Ray's processes run already, so they inherit nothing of what is named now.
from vllm_afbs import compat
from vllm_afbs.observability import instance, kill_switch, membership, metrics
from vllm.config import VllmConfig
metrics.publish()
config = VllmConfig()
membership.begin_server(config)

@ray.remote(num_cpus=0)
class Worker:
    def __init__(self, config):
        metrics.publish()
        inherited = instance.current()
        membership.join_server(config)
        self.is_foreign = inherited != instance.current()
        self.switch = kill_switch.KillSwitch()

    def look(self):
        return self.is_foreign, self.switch.is_enabled(), instance.current().directory

workers = [Worker.remote(config) for _ in range(2)]
directory = instance.current().directory
assert ray.get([each.look.remote() for each in workers]) == [(True, True, directory)] * 2
kill_switch.set_enabled(False)
deadline = time.monotonic() + 20
while kill_switch.count_acknowledged(False) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
assert kill_switch.count_acknowledged(False) == 2
assert ray.get([each.look.remote() for each in workers]) == [(True, False, directory)] * 2
ray.shutdown()
print("DONE")
"""


def test_off_reaches_workers_that_ray_starts(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    for name in (instance.DIRECTORY_VARIABLE, instance._SERVER_VARIABLE):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", RAY_DRIVER], env=environment, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert "DONE" in done.stdout, done.stderr[-3000:]


def test_the_directory_goes_with_the_configuration_and_not_with_its_hash() -> None:
    from vllm.config import VllmConfig

    config = VllmConfig()
    before = config.compute_hash()
    membership.begin_server(config)
    assert config.compute_hash() == before
    assert kill_switch.read_state().enabled


def test_another_machine_has_a_switch_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker there gets a directory that it does not have."""
    handed = instance.Instance("elsewhere-7-0123456789abcdef", str(tmp_path / "there"))
    monkeypatch.setattr(instance, "_joined", None)
    instance.join(handed)
    switch = kill_switch.KillSwitch()
    assert switch.is_enabled()
    (file,) = (tmp_path / "there").glob("afbs-switch-*")
    file.unlink()
    assert not switch.is_enabled()
    assert not kill_switch.KillSwitch().is_enabled()


def test_where_the_switch_cannot_be_kept_all_is_dense_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "file" / "metrics"))
    switch = kill_switch.KillSwitch()
    assert not switch.is_enabled()
    switch.keep()
    assert [line for line in logged if "Every prefill runs dense" in line]
    assert len(logged) == len(set(logged)) <= 4
    assert kill_switch.count_acknowledged(False) == 0


def test_a_look_takes_microseconds() -> None:
    switch = kill_switch.KillSwitch()
    started = time.perf_counter()
    for _ in range(2000):
        switch.is_enabled()
    assert (time.perf_counter() - started) / 2000 < 100e-6


def test_a_container_that_starts_again_removes_what_it_left(tmp_path: Path) -> None:
    """Its processes have the same name and ids as before."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    mine = f"{instance.host()}-{os.getpid()}-0123456789abcdef"
    (directory / f"afbs-switch-{mine}").write_text("off")
    (directory / f"afbs-seen-{mine}-{instance.host()}-1").write_text("off")
    elsewhere = directory / f"afbs-switch-elsewhere-{os.getpid()}-0123456789abcdef"
    elsewhere.write_text("off")
    kill_switch.begin()
    assert set(directory.iterdir()) == {elsewhere, kill_switch.switch_file()}
