"""An evaluation that lacks memory, fails or is given odd arguments; how many logits it holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.profiles import uniform_profile
from tests.test_evaluate import BLOCK, METHOD, arguments
from tests.tuning_jobs import IN_PROCESS
from vllm_afbs.commands.faults import EXIT_FAULT
from vllm_afbs.evaluate import __main__ as command
from vllm_afbs.evaluate.in_process import InProcess, Runner
from vllm_afbs.evaluate.methods import Selection
from vllm_afbs.evaluate.options import TESTS
from vllm_afbs.files import write_atomically
from vllm_afbs.models.in_process.engine import EndToEnd
from vllm_afbs.models.in_process.source import open_model

VOCABULARY = 256
ROWS = 64
TOKENS = [(7 * i * i) % 60 for i in range(300)]


class MostLogits(TorchDispatchMode):
    """Watches for the most rows of any tensor as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else [result]:
            if torch.is_tensor(each) and each.dim() and each.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, each.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[: ROWS + 1], TOKENS[: ROWS + 2], TOKENS[:2]])
def test_few_logits_of_a_long_text_are_held_at_once(
    tokens: list[int], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("vllm_afbs.models.in_process.logits._ROWS", ROWS)
    model = open_model(str(tiny_model))
    runner = Runner(model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    ids = torch.tensor(tokens)
    with torch.inference_mode():
        logits = plain(ids[None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    with MostLogits() as watched:
        losses = InProcess(runner, None).losses(tokens)
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-3)
    assert watched.rows == min(ROWS, len(tokens) - 1)
    with MostLogits() as watched:
        losses = EndToEnd(model, BLOCK, BLOCK).losses(tokens, {})
    torch.testing.assert_close(losses, expected, atol=1e-3, rtol=1e-3)
    # Loading the weights makes tensors that are as wide.
    sparse = InProcess(runner, Selection(METHOD, 0.3))
    with MostLogits() as watched:
        sparse.next_tokens([(tokens, 5)])
        sparse.generate([tokens, tokens[:-1]], 3)
    assert watched.rows <= 2


def test_long_prompts_are_decoded_few_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(open_model(str(tiny_model)))
    prompts = [TOKENS[i : 100 + 20 * i] for i in range(5)]
    together = runner.generate(prompts, 4)
    sizes: list[int] = []
    decode = runner._decode

    def counted(batch: Any, num_tokens: int) -> list[list[int]]:
        sizes.append(len(batch))
        return decode(batch, num_tokens)

    monkeypatch.setattr(runner, "_decode", counted)
    monkeypatch.setattr("vllm_afbs.evaluate.in_process._CACHED_TOKENS", 400)
    assert runner.generate(prompts, 4) == together
    assert sizes == [2, 2, 1]
    assert runner.generate([], 4) == []


@pytest.fixture(scope="module")
def profile_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = open_model(str(tiny_model)).fingerprint
    profile = uniform_profile(shape, 0.6, 0.5, [128, 256], block_q=BLOCK, block_k=BLOCK)
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    write_atomically(path, profile.to_json())
    return path


@pytest.mark.parametrize(
    ("error", "complaint", "status"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB. GPU 0 has"),
            "out of GPU memory (40.00 GiB more asked for) while evaluating: a shorter --length",
            2,
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory while evaluating: a shorter --length expected",
            2,
        ),
        (ZeroDivisionError("line\nanother"), "a fault of vllm-afbs, not of what you gave", 70),
    ],
)
def test_a_failure_on_the_way_is_one_line(
    error: Exception,
    complaint: str,
    status: int,
    tiny_model: Path,
    profile_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("vllm_afbs.evaluate.in_process.token_losses", fail)
    output = tmp_path / "quality.json"
    assert command.main(arguments(tiny_model, profile_file, output)) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert not output.exists()
    if status == EXIT_FAULT:
        (kept,) = tmp_path.glob("vllm-afbs-fault-*")
        assert str(kept) in lines[0]
        assert "ZeroDivisionError" in kept.read_text()


def test_an_interrupt_is_one_line(
    tiny_model: Path,
    profile_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_afbs.evaluate.in_process.token_losses", interrupt)
    given = arguments(tiny_model, profile_file, tmp_path / "quality.json")
    assert command.main(given) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted, nothing is written")


LIMITS = {
    "--length": (-1, 300), "--windows": (0, 3), "--prefixes": (0, 3), "--continuations": (0, 3),
    "--new-tokens": (0, 400), "--per-task": (0, 2), "--seed": (-3, 3),
}  # fmt: skip
OPTIONS = st.fixed_dictionaries(
    {}, optional={name: st.integers(*limits) for name, limits in LIMITS.items()}
)
CONTENTS = st.one_of(
    st.none(),
    st.text(max_size=2000).map(str.encode),
    st.binary(max_size=200),
    st.integers(200, 2000).map(lambda n: b"word and other words. " * (n // 20)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(OPTIONS, st.lists(st.sampled_from(TESTS), max_size=2, unique=True), CONTENTS)
def test_fuzzed_arguments_end_in_a_report_or_in_one_line(
    tiny_model: Path,
    profile_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
    options: dict[str, int],
    tests: list[str],
    content: bytes | None,
) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    few = {
        "--windows": 1,
        "--prefixes": 1,
        "--continuations": 1,
        "--per-task": 1,
        "--new-tokens": 2,
    }
    named = [str(each) for pair in (few | options).items() for each in pair]
    where = ["--model", str(tiny_model), "--profile", str(profile_file), *IN_PROCESS]
    given_ = [*where, "--output", str(folder / "quality.json"), *named]
    if tests:
        given_ += ["--tests", *tests]
    if content is not None:
        (folder / "text.txt").write_bytes(content)
        given_ += ["--text", str(folder / "text.txt")]
    try:
        status = command.main(given_)
    except SystemExit as stopped:  # of argparse
        status = int(str(stopped.code))
    lines = capfd.readouterr().err.splitlines()
    assert status in (0, 2)
    assert (folder / "quality.json").exists() == (status == 0)
    assert not any("Traceback" in line for line in lines)
    assert sum("error:" in line for line in lines) == (status != 0)
