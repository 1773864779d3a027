"""Layers tuned side by side in Ray workers: the same profile, also after a kill."""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.search_layers import captured, clustered
from tests.tuning_jobs import command, result, start
from vllm_afbs import tune
from vllm_afbs.captures import Capture
from vllm_afbs.cost_models import CpuCost
from vllm_afbs.errors import InputError
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.tuning import workers
from vllm_afbs.tuning.journal import Journal, Steps
from vllm_afbs.tuning.run import tune as tune_model
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.results import Settled
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.workers import LayerPool, Share, search_layer


class Quiet:
    """Hears a job's progress, and adds it up."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}

    def begin(self, stage: str, total: int) -> None:
        self.stages[stage] = -total

    def advance(self, units: float) -> None:
        self.stages[next(reversed(self.stages))] += units


def test_a_worker_settles_a_layer_at_the_tolerances_it_is_given(tmp_path: Path) -> None:
    settings = SearchSettings([128, 256], 0.1, 32, 32, seed=0)
    taken = captured(tmp_path, 256, clustered)
    steps = Steps([], lambda _: None)
    LayerSearch(settings, 0, taken, steps, lambda _: None).curves()
    known = steps.entries("layer 0 ")
    threads = torch.get_num_threads()
    events = list(search_layer(settings, 0, [0.05, 0.2], taken, known, threads))
    assert sum(event for event in events if isinstance(event, float)) == pytest.approx(1.0)
    done = [event for event in events if not isinstance(event, float)]
    assert [each.step for each in done] == [f"layer 0 settle {n}" for n in (0.05, 0.2)]
    here = LayerSearch(settings, 0, taken, steps, lambda _: None).settled([0.2])
    assert done[-1].read(Settled).heads == here[0.2]
    assert any(head.tau < 1.0 for head in here[0.2])


def test_workers_find_what_one_process_finds_and_say_what_they_cannot_read(
    tiny_model: Path, tiny_profile: Profile, tmp_path: Path
) -> None:
    settings = SearchSettings([128, 256], 0.2, 16, 16, seed=0)
    progress = Quiet()
    model, texts = open_model(str(tiny_model)), read_texts([])
    # Earlier tests of this process may have left multiprocessing's resource tracker.
    before = psutil.Process().children(recursive=True)
    with LayerPool(2, None) as pool:
        found = tune_model(
            model, TransformersEngine(model), texts, settings, [0, 1], None, "analytic",
            CpuCost(), tmp_path / "work", progress, pool,
        )  # fmt: skip

        journal = Journal(tmp_path / "journal.jsonl", {})
        nothing = Capture(tmp_path / "none", (0,), ("validation-0",))
        with pytest.raises(InputError) as refused:
            pool.search(settings, [0], {}, nothing, journal, lambda _: None)
    assert set(psutil.Process().children(recursive=True)) <= set(before)

    assert any(head.tau < 1.0 for head in found.heads_of(found.level_index()))
    assert result(found) == result(tiny_profile)
    assert all(left == pytest.approx(0.0) for left in progress.stages.values())
    assert str(refused.value).startswith(f"{tmp_path}/none/layer-000.calibration.safetensors: ")
    assert "\n" not in str(refused.value)


def test_a_worker_with_a_gpu_searches_one_layer_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_with_made_up_gpu(ray: Any, count: int | None, stack: ExitStack) -> None:
        stack.callback(ray.shutdown)
        ray.init(
            address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", object_store_memory=100 << 20,
        )  # fmt: skip

    monkeypatch.setattr(workers, "_start", start_with_made_up_gpu)
    settings = SearchSettings([128, 256], 0.1, 32, 32, seed=0)
    taken = captured(tmp_path, 256, clustered)
    for path in taken.directory.glob("layer-000.*"):
        path.with_name(path.name.replace("000", "001")).symlink_to(path)
    journal = Journal(tmp_path / "journal.jsonl", {})
    searching: dict[int, list[int]] = {0: [], 1: []}

    def look(share: float) -> None:
        layer = int(bool(journal.entries("layer 1 ")))
        children = psutil.Process().children(recursive=True)
        searching[layer] += [each.pid for each in children if "_Worker" in each.name()]

    with LayerPool(1, None) as pool:
        pool.search(settings, [0, 1], {}, taken, journal, look)
    # Another one would import PyTorch and Ax and find its GPU anew.
    assert len(set(searching[0])) == 1
    assert set(searching[0]) == set(searching[1])


def wait_for_both_layers(job: subprocess.Popen[str], output: Path) -> None:
    """Waits until the journal of a running job holds steps of both layers."""
    journal = Path(f"{output}.work") / "journal.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        text = journal.read_text() if journal.exists() else ""
        if all(f'"step": "layer {layer} ' in text for layer in (0, 1)):
            return
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    pytest.fail("steps of both layers expected within 300 s")


def test_killed_with_workers_and_resumed_with_workers_equals_one_process(
    tiny_model: Path, tiny_profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    arguments = command(tiny_model, output, "--tolerance", "0.2", "--workers", "2")
    job = start(arguments)
    wait_for_both_layers(job, output)
    started = {process: process.name() for process in psutil.Process(job.pid).children(True)}
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in started
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    job.send_signal(signal.SIGKILL)
    _, errors = job.communicate()
    assert "raylet" in started.values()
    assert listening == {"127.0.0.1"}
    assert "Traceback" not in errors
    # Ray's agents, which compute nothing, take up to a minute to see that they are alone.
    busy = [process for process, name in started.items() if not name.endswith("Agent")]
    assert psutil.wait_procs(busy, timeout=60)[1] == []

    assert tune.main([*arguments, "--resume"]) == 0
    assert result(load_profile(output)) == result(tiny_profile)
    captured = capsys.readouterr()
    assert all(
        line.startswith(("running the model", "Capturing", "Tuning", "Measuring"))
        for line in captured.err.splitlines()
    )


def test_without_the_extra_workers_are_refused(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert tune.main(command(tiny_model, tmp_path / "p.json", "--workers", "2")) == 2
    assert "pip install 'vllm-afbs[ray]'" in capsys.readouterr().err


MACHINES = st.fixed_dictionaries({"CPU": st.integers(0, 64), "GPU": st.integers(0, 8)})


@given(count=st.integers(1, 20) | st.none(), machines=st.lists(MACHINES, max_size=5))
def test_a_share_fits_a_machine(count: int | None, machines: list[Mapping[str, float]]) -> None:
    usable = [machine for machine in machines if machine["CPU"]]
    gpus = sum(machine["GPU"] for machine in usable)
    if not usable or (gpus and (count or 0) > gpus):
        with pytest.raises(InputError, match=r"^--(ray-address|workers): .* expected, "):
            Share.of(count, machines)
        return
    share = Share.of(count, machines)
    assert share.gpus == (gpus > 0)
    assert share.threads >= 1
    for machine in usable:
        if machine["GPU"] or not gpus:
            assert share.threads <= machine["CPU"]
    if count is None:
        assert share.count == (gpus or len(usable))
    else:
        assert share.count == count


def test_cores_are_divided_among_workers() -> None:
    assert Share.of(4, [{"CPU": 16.0}]) == Share(count=4, threads=4, gpus=0)
    assert Share.of(3, [{"CPU": 2.0}]) == Share(count=3, threads=1, gpus=0)
    two = [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert Share.of(None, two) == Share(count=2, threads=8, gpus=1)
