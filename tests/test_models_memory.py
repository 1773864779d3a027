"""Too little memory is one line that says what to shorten; a fault of ours says that it is one."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import changed_model
from tests.tuning_jobs import command
from vllm_afbs import tune
from vllm_afbs.commands import faults
from vllm_afbs.errors import InputError
from vllm_afbs.evaluate.in_process import Runner
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning import memory

GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.1 GiB"


def allocator_error() -> RuntimeError:
    """What the allocator of this build raises."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    return raised.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(GPU), "GPU memory (20.00 GiB more asked for)"),
        (RuntimeError("CUDA error: out of memory\nCompile with..."), "GPU memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "GPU memory"),
        (allocator_error(), "memory (4503599627370496 bytes more asked for)"),
        (MemoryError(), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (InputError("out of GPU memory while ..."), None),
        (OSError(28, "No space left on device"), None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_ran_out_is_recognised(error: Exception, expected: str | None) -> None:
    assert memory.exhausted(error) == expected
    with pytest.raises(type(error) if expected is None else InputError) as raised:  # noqa: SIM117
        with memory.explained("tuning", "shorter --lengths expected"):
            raise error
    if expected is not None:
        assert str(raised.value) == f"out of {expected} while tuning: shorter --lengths expected"


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from tests.tuning_jobs import command
from vllm_afbs import tune
from vllm_afbs.models.in_process import weights
from vllm_afbs.models.in_process.recorder import Recorder

def limit():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + {room_bytes}
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

original = {target}
def limited(*args, **kwargs):
    limit()
    return original(*args, **kwargs)
{target} = limited
sys.exit(tune.main(command(Path(sys.argv[1]), Path(sys.argv[2]))))
"""


@pytest.mark.parametrize(
    ("target", "room_bytes", "expected"),
    [
        ("weights._load", 16 << 20, "out of memory.* while loading the weights of {model}: a mach"),
        ("Recorder.run", 8 << 20, "{model}: out of memory.* over 256 tokens: shorter --lengths"),
    ],
)
def test_the_system_gives_no_more_memory(
    target: str, room_bytes: int, expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    """The kernel refuses; the model's vocabulary or width is what needs the memory."""

    def widen(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: each.repeat(1, 512) if "down_proj" in name
            else each.repeat(512, 1) if "mlp." in name else each
            for name, each in weights.items()
        }  # fmt: skip

    model = changed_model(tiny_model, tmp_path / "model", widen, intermediate_size=64 * 512)
    job = subprocess.run(
        [sys.executable, "-c", LIMITED.format(target=target, room_bytes=room_bytes), str(model),
         str(tmp_path / "p.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in job.stderr
    (line,) = [each for each in job.stderr.splitlines() if "error:" in each]
    assert re.search(expected.format(model=re.escape(str(model))), line), line
    assert job.returncode == 2
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    "place",
    ["texts.read_texts", "run.tune", "search.evaluator.LayerEvaluator.score", "capture.capture"],
)
def test_running_out_anywhere_is_one_line(
    place: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(GPU)

    monkeypatch.setattr(f"vllm_afbs.tuning.{place}", fail)
    if place == "capture.capture":
        monkeypatch.setattr("vllm_afbs.tuning.run.capture", fail)
    assert tune.main(command(tiny_model, tmp_path / "p.json")) == 2
    lines = [each for each in capsys.readouterr().err.splitlines() if "error:" in each]
    assert len(lines) == 1
    assert "out of GPU memory (20.00 GiB more asked for) while tuning: shorter --l" in lines[0]


def test_logits_of_a_long_text_are_never_held_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(open_model(str(tiny_model)))
    tokens = [(5 * i) % 60 for i in range(300)]
    with torch.inference_mode():
        logits = runner._model(input_ids=torch.tensor([tokens])).logits[0]
        log_probs = torch.log_softmax(logits.double(), -1)
    expected = -log_probs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    monkeypatch.setattr("vllm_afbs.models.in_process.logits._ROWS", 64)
    rows: list[int] = []
    head = runner._model.lm_head
    head.register_forward_hook(lambda _, inputs, output: rows.append(output.shape[1]))
    losses = runner.losses(tokens)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)
    assert rows == [64, 64, 64, 64, 43]
    # The model is as it was.
    again = runner._model(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(again, logits)


def test_a_fault_of_ours_is_said_and_its_traceback_kept(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a name\nof ours")

    monkeypatch.setattr("vllm_afbs.tuning.run.tune", fail)
    assert tune.main(command(tiny_model, tmp_path / "p.json")) == faults.EXIT_FAULT
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error:" in each]
    assert "vllm-afbs-tune: error: a fault of vllm-afbs, not of what you gave: KeyError: " in line
    (kept,) = tmp_path.glob("vllm-afbs-fault-*.txt")
    assert line.endswith(f"kept in {kept}")
    text = kept.read_text()
    assert "Traceback (most recent call last)" in text
    assert "in fail\n" in text
    assert kept.stat().st_mode & 0o077 == 0


def test_a_fault_is_said_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")

    def fail() -> int:
        raise ZeroDivisionError

    assert faults.guarded("program", fail) == faults.EXIT_FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"test_models_memory\.py, line \d+; the traceback could not be kept", line)
