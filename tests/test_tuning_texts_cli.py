"""Rows and chats given to the command lines of the tuner and of the evaluation."""

import json
import shutil
from pathlib import Path

import pytest

from tests.chat_tokenizers import chat_tokenizer
from tests.tuning_jobs import IN_PROCESS, command
from vllm_afbs import tune
from vllm_afbs.evaluate.__main__ import main as evaluate
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.tuner_run import TextSource
from vllm_afbs.tuning.texts import Text

CHATS = [
    [
        {"from": "human", "value": f"question {number} of {number * number % 97}"},
        {"from": "gpt", "value": f"answer {number}, {number % 7} times"},
    ]
    for number in range(30)
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"id": 1, "turns": chat, "body": "b"} for chat in CHATS] + [
        {"id": 2, "turns": None, "body": ""}
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    chat_tokenizer().save_pretrained(directory)
    return directory


def test_chats_are_tuned_on_as_the_template_writes_them(
    chat_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    given = ["--calibration", str(chats), "--calibration-column", "turns", "--tolerance", "0.2"]
    assert tune.main(command(chat_model, output, *given)) == 0
    said = "30 rows of 'turns', through the chat template; skipped: 1 empty"
    assert f"{chats}: {said}" in capsys.readouterr().err.splitlines()
    (source,) = load_profile(output).calibration_texts
    written = "\n\n".join(
        f"<user>{question['value']}<assistant>{answer['value']}" for question, answer in CHATS
    )
    assert (source.name, source.coverage) == (str(chats), said)
    assert source.sha256 == Text("", written).sha256
    assert said.replace("'", "&#39;") in output.with_suffix(".html").read_text()


def test_a_model_without_a_template_takes_no_chats(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--calibration", str(chats), "--calibration-column", "turns"]
    assert tune.main(command(tiny_model, tmp_path / "p.json", *given)) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"vllm-afbs-tune: error: {chats}: line 1: turns: chats expect a model with a chat "
        "template, this one has none: give plain text or a column of text"
    ]


def test_columns_are_listed_before_anything_is_written(
    tiny_model: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "p.json"
    assert tune.main(command(tiny_model, output, "--calibration", str(chats))) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"vllm-afbs-tune: error: {chats}: line 1: a column 'text', 'messages' or 'conversations' "
        "expected, found id, turns, body; --calibration-column (of evaluate: --text-column) names "
        "the one to read"
    ]
    assert not Path(f"{output}.work").exists()


def test_a_short_text_is_told_with_what_was_read_of_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "x"}\n' * 31)
    given = ["--calibration", str(rows), "--calibration-column", "body"]
    assert tune.main(command(tiny_model, tmp_path / "p.json", *given)) == 2
    assert f"{rows} (31 rows of 'body'): the calibration text has 91 tokens, 512 expected" in (
        capsys.readouterr().err
    )


def test_the_evaluation_reads_the_same_rows(
    chat_model: Path,
    chats: Path,
    tiny_profile: Profile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = tmp_path / "profile.json"
    written = "\n\n".join(["b"] * 30)
    tuned = TextSource(name="x", sha256=Text("", written).sha256, num_tokens=9)
    write_atomically(
        profile, tiny_profile.model_copy(update={"calibration_texts": [tuned]}).to_json()
    )
    given = ["--model", str(chat_model), "--profile", str(profile), *IN_PROCESS]
    given += ["--output", str(tmp_path / "q.json"), "--text", str(chats), "--tests", "perplexity"]
    for column, complaint in (
        ("body", f"{chats}: a held-out text expected: the profile was tuned on this one"),
        ("id", f"{chats}: line 1: id: text or chat messages expected, got int"),
    ):
        assert evaluate([*given, "--text-column", column]) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(complaint)
    assert evaluate([*given, "--text-column", "turns"]) == 0
    said = "30 rows of 'turns', through the chat template; skipped: 1 empty"
    assert f"{chats}: {said}" in capsys.readouterr().err.splitlines()
    assert json.loads((tmp_path / "q.json").read_text())["text"]["coverage"] == said


def test_profiles_of_whole_files_are_as_they_were(tiny_profile: Profile) -> None:
    """The field that says what was read is left out where it says nothing, or ids would change."""
    assert tiny_profile.calibration_texts
    assert "coverage" not in tiny_profile.to_json()


@pytest.mark.parametrize("damaged", ["null", "{", '{"version": "1.0"}', "[]"])
def test_a_damaged_tokenizer_is_one_line(
    damaged: str, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chat_model / "tokenizer.json").write_text(damaged)
    assert tune.main(command(chat_model, tmp_path / "p.json")) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error:" in each]
    assert line.startswith(f"vllm-afbs-tune: error: {chat_model}: cannot read the tokenizer: ")
