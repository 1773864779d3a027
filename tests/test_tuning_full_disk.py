"""A disk that fills up at any stage of a tuning job: one line, nothing lost, and on it goes."""

import resource
import shutil
from pathlib import Path

import pytest

from tests.full_disk import HARD_LIMIT, room_for
from tests.tuning_jobs import command, result, start, wait_for_steps
from vllm_afbs import tune
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.errors import InputError
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.tuning.capture import capture

# Of the tiny model, a captured layer takes 64 KB, the journal less and the report some MB.
NO_CAPTURE, NO_REPORT = 40_000, 1_000_000


def only_error(text: str) -> str:
    """The one line of a job's standard error that is not a progress bar's."""
    assert "Traceback" not in text
    (line,) = [
        line
        for line in text.splitlines()
        if not line.startswith(("running the model", "Capturing", "Tuning", "Measuring"))
    ]
    return line


def test_a_job_goes_on_wherever_the_disk_was_full(
    tiny_model: Path, tiny_profile: Profile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    work = Path(f"{output}.work")
    journal = work / "journal.jsonl"
    arguments = command(tiny_model, output, "--tolerance", "0.2")
    kept = f"; {work} keeps what is done, and --resume goes on with it"

    with room_for(NO_CAPTURE):
        assert tune.main(arguments) == 1
    line = only_error(capsys.readouterr().err)
    assert line.startswith(f"vllm-afbs-tune: error: {work}/capture-")
    assert "/layer-000.calibration.safetensors: File too large" in line
    assert line.endswith(kept)
    assert not list(work.glob("capture-*/*"))

    # The disk fills up while the job runs, in the middle of a line of its journal.
    job = start([*arguments, "--resume"])
    wait_for_steps(job, output, 4)
    limit = journal.stat().st_size + 10
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (limit, HARD_LIMIT))
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 1
    assert only_error(errors) == f"vllm-afbs-tune: error: {journal}: File too large{kept}"
    done = journal.read_bytes().splitlines(keepends=True)
    assert len(done) >= 4

    capsys.readouterr()
    with room_for(NO_REPORT):
        assert tune.main([*arguments, "--resume"]) == 1
    report = output.with_suffix(".html")
    line = only_error(capsys.readouterr().err)
    assert line == f"vllm-afbs-tune: error: {report}: File too large{kept}"
    assert {path.name for path in tmp_path.iterdir()} == {work.name}
    whole = journal.read_bytes()
    assert whole.startswith(b"".join(each for each in done if each.endswith(b"\n")))

    assert tune.main([*arguments, "--resume"]) == 0
    assert result(load_profile(output)) == result(tiny_profile)
    assert {path.name for path in tmp_path.iterdir()} == {output.name, report.name}


def test_a_job_that_will_not_fit_is_refused(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    output = tmp_path / "p.json"
    assert tune.main(command(tiny_model, output)) == 2
    assert "free" in capsys.readouterr().err
    assert not output.exists()


def test_what_is_captured_already_needs_no_room(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(tiny_model))
    windows = {CALIBRATION: [1] * 64, "a": [2] * 64, "b": [3] * 64}
    taken = capture(model, TransformersEngine(model), windows, range(2), tmp_path, lambda _: None)
    lost = [taken.path(0, "a"), taken.path(1, "b")]
    # Four query heads of 16 and two each of keys and values, in bf16.
    layer_bytes = 64 * 8 * 16 * 2
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((2.9, False), (3.0, True)):
        for path in lost:
            path.unlink()
        here = usage._replace(free=int(free * layer_bytes))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, here=here: here)
        if fits:
            capture(model, TransformersEngine(model), windows, range(2), tmp_path, lambda _: None)
            assert all(path.is_file() for path in lost)
            continue
        with pytest.raises(InputError, match="free"):
            capture(model, TransformersEngine(model), windows, range(2), tmp_path, lambda _: None)
        for path in lost:
            path.touch()
