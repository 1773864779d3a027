"""What vLLM refuses is told apart from a fault of ours, whatever exception it refuses with."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.test_check import OURS, llama_config, outcome
from vllm_afbs import compat
from vllm_afbs.check.refusals import RefusedError, refusals_of_vllm
from vllm_afbs.demo.server import SERVER_ENVIRONMENT
from vllm_afbs.serving import admission

REFUSED = "vllm-afbs-check: error: vLLM refuses this configuration: "


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "kept"))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "CRITICAL")
    for name in ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE", "VLLM_AFBS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SERVER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def save_model(directory: Path, **fields: Any) -> Path:
    (directory / "model").mkdir()
    config = llama_config().to_dict() | fields
    (directory / "model" / "config.json").write_text(json.dumps(config))
    return directory / "model"


@pytest.mark.parametrize(
    ("fields", "arguments", "reason"),
    [
        ({"rope_scaling": {"type": "su"}}, [], 'KeyError: "Missing required keys in `rope_param'),
        ({"num_attention_heads": 0}, [], "ZeroDivisionError: integer modulo by zero"),
        ({"hidden_size": None}, [], "StrictDataclassFieldValidationError: Validation error for"),
        ({"quantization_config": []}, [], "AttributeError: 'list' object has no attribute"),
        # An assertion without a message is told by its line.
        ({"architectures": ["NomicBertModel"]}, [], "AssertionError: assert config."),
        ({}, ["--max-model-len", "999999"], "User-specified max_model_len (999999) is greater"),
        (
            {},
            ["--max-num-batched-tokens", "0"],
            "max_num_batched_tokens: Input should be greater than or equal to 1",
        ),
        ({}, ["--device-ids", "a"], "Non-integer device ID 'a' is not supported by cpu"),
        ({}, ["--enable-sleep-mode"], "Sleep mode is not supported on current platform"),
        # From vLLM's check of what its parser has parsed, and from its choice of pages.
        ({}, ["--chat-template", "/none"], "VLLMValidationError: The supplied chat template"),
        ({}, ["--block-size", "7"], "No common block size for 7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_vllm_refuses_is_bad_input_and_its_traceback_is_kept(
    fields: dict[str, Any], arguments: list[str], reason: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = save_model(tmp_path, **fields)
    status, _, error = outcome(capsys, "--model", model, OURS, *arguments)
    assert status == 2
    assert "Traceback" not in error
    (line,) = [each for each in error.splitlines() if "error: " in each]
    assert line.startswith(f"{REFUSED}{reason}")
    (kept,) = (tmp_path / "kept").glob("vllm-afbs-refused-*.txt")
    assert line.endswith(f"; the traceback is kept in {kept}")
    assert len(line) < 1000
    text = kept.read_text()
    assert "Traceback (most recent call last)" in text
    # vLLM's own frames, not only those of pydantic, which wraps what vLLM raised.
    assert f"{Path(vllm.__file__).parent}{os.sep}" in text


def test_a_long_reason_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here, with a list of all architectures."""
    model = save_model(tmp_path, architectures=["Nope"])
    status, _, error = outcome(capsys, "--model", model, OURS)
    assert status == 2
    (line,) = [each for each in error.splitlines() if "error: " in each]
    assert line.startswith(f"{REFUSED}Model architectures ['Nope'] are not supported for now")
    assert len(line) < 1000
    (kept,) = (tmp_path / "kept").glob("vllm-afbs-refused-*.txt")
    assert "MambaForCausalLM" in kept.read_text()


@pytest.mark.parametrize("error", [KeyError("ours"), ValueError("ours"), AssertionError("ours")])
def test_a_fault_of_ours_among_vllms_frames_stays_one(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """While vLLM makes the configuration it calls our platform, and pydantic wraps some errors."""

    def fail(config: Any) -> bool:
        raise error

    monkeypatch.setattr(admission, "admit_or_exit", fail)
    status, _, printed = outcome(capsys, "--model", save_model(tmp_path), OURS)
    assert status == 70
    assert "a fault of vllm-afbs, not of what you gave: " in printed
    (kept,) = (tmp_path / "kept").glob("vllm-afbs-fault-*.txt")
    assert "ours" in kept.read_text()


def test_our_wrong_call_of_vllm_is_our_fault() -> None:
    """As after a change of vLLM's interface."""
    with pytest.raises(TypeError), refusals_of_vllm():
        compat.is_afbs()  # type: ignore[call-arg]
    with pytest.raises(RefusedError, match=r"^first$"), refusals_of_vllm():
        raise RefusedError("first")
