"""Calibration texts that are rows: JSON, Parquet and CSV files, columns and chats."""

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.chat_tokenizers import chat_tokenizer
from vllm_afbs import tune
from vllm_afbs.tuning.model import InputError
from vllm_afbs.tuning.texts import Text, read_texts

ROWS = ["first\nrow", "second \u2028 row", "dritte Zeile äöü"]
CONTENT = "\n\n".join(ROWS)
OPENAI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
CHAT = "<user>hi<assistant>yo"
Rows = list[dict[str, Any]]


def lines(rows: Rows) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def _jsonl(path: Path, rows: Rows) -> None:
    path.write_text(lines(rows))


def _jsonl_of_windows(path: Path, rows: Rows) -> None:
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())


def _compressed(path: Path, rows: Rows) -> None:
    with gzip.open(path, "wt") as file:
        file.write(lines(rows))


def _array(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows))


def _indented_array(path: Path, rows: Rows) -> None:
    path.write_text("\n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _parquet(path: Path, rows: Rows) -> None:
    Dataset.from_list(rows).to_parquet(path)


def _csv(path: Path, rows: Rows) -> None:
    Dataset.from_list(rows).to_csv(path)


WRITERS: list[tuple[str, Callable[[Path, Rows], None]]] = [
    ("rows.jsonl", _jsonl),
    ("rows.NDJSON", _jsonl_of_windows),
    ("rows.jsonl.gz", _compressed),
    ("rows.json", _array),
    ("indented.json", _indented_array),
    ("lines.json", _jsonl),
    ("rows.json.gz", _compressed),
    ("rows.parquet", _parquet),
    ("rows.csv", _csv),
]


def read(path: Path, column: str | None = None, template: str | None = None) -> Text:
    (text,) = read_texts([path], column, lambda: chat_tokenizer(template))
    return text


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_a_file_of_rows_is_its_texts(
    name: str, write: Callable[[Path, Rows], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, [{"n": n, "text": row, "other": f"not {row}"} for n, row in enumerate(ROWS)])
    text = read(path)
    assert (text.name, text.content) == (str(path), CONTENT)
    assert text.coverage == "3 rows of 'text'"
    assert read(path, "other").content == "\n\n".join(f"not {row}" for row in ROWS)


@pytest.mark.parametrize("column", ["messages", "conversations", "dialogue"])
@pytest.mark.parametrize("chat", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
@pytest.mark.parametrize(
    ("name", "write"),
    [each for each in WRITERS if each[0] in ("rows.jsonl", "rows.json", "rows.parquet")],
    ids=["jsonl", "json", "parquet"],
)
def test_chats_go_through_the_template(
    name: str,
    write: Callable[[Path, Rows], None],
    chat: list[dict[str, str]],
    column: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    write(path, [{"id": 1, column: chat}, {"id": 2, column: chat}])
    named = column if column == "dialogue" else None
    text = read(path, named)
    assert text.content == f"{CHAT}\n\n{CHAT}"
    assert text.coverage == f"2 rows of '{column}', through the chat template"


def test_messages_of_every_shape(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows: Rows = [
        {"messages": [{"role": "user", "content": parts}, {"from": "observation", "value": "c"}]},
        {"messages": [calls, {"role": "user", "content": "<s>"}]},
        # A data set that an older `datasets` saved.
        {"messages": {"role": ["system", "user"], "content": ["d", "e"]}},
    ]
    path.write_text(lines(rows))
    assert read(path).content == "\n\n".join(
        ["<user>ab<tool>c", "<assistant>[f]<user><s>", "<system>d<user>e"]
    )


def test_the_first_usual_column_is_read(tmp_path: Path) -> None:
    row = {"conversations": SHAREGPT, "messages": OPENAI[:1], "text": "words"}
    path = tmp_path / "rows.jsonl"
    path.write_text(lines([row]))
    assert read(path).content == "words"
    assert read(path, "conversations").content == CHAT
    del row["text"]
    path.write_text(lines([row]))
    assert read(path).content == "<user>hi"


@pytest.mark.parametrize(
    ("name", "write"),
    [each for each in WRITERS if each[0] in ("rows.jsonl", "rows.json", "rows.parquet")],
    ids=["jsonl", "json", "parquet"],
)
def test_empty_rows_are_skipped_and_counted(
    name: str, write: Callable[[Path, Rows], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, [{"text": text} for text in ("a", None, "", " \n", "b")])
    text = read(path)
    assert text.content == "a\n\nb"
    assert text.coverage == "2 rows of 'text'; skipped: 3 empty"

    silent = [{"role": "user", "content": ""}]
    write(path, [{"messages": chat} for chat in (None, OPENAI, silent, [])])
    text = read(path)
    assert text.content == CHAT
    assert text.coverage == "1 row of 'messages', through the chat template; skipped: 3 empty"


def test_chats_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(lines([{"messages": chat} for chat in (OPENAI[1:], OPENAI, OPENAI[1:])]))
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with\nuser') }}{% endif %}x"
    )
    text = read(path, template=template)
    assert text.content == "x"
    assert text.coverage == (
        "1 row of 'messages', through the chat template; skipped: 2 that the chat template refuses "
        "(the first: begin with user)"
    )
    with pytest.raises(InputError, match=r"empty: 0 rows .*3 that .*: .* by zero\)"):
        read(path, template="{{ 1 // 0 }}")


def test_what_begins_a_prompt_is_not_repeated_in_every_chat(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(lines([{"messages": OPENAI}]))
    assert read(path, template="{{ bos_token }}{{ messages[0].content }}").content == "hi"


def test_halves_of_surrogate_pairs_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"name\xff\n.jsonl")
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}')
    text = read(path)
    assert text.content == "a\ufffdb 🙂"
    assert len(text.sha256) == 64
    assert text.name == str(tmp_path / "name") + "\\udcff\\n.jsonl"


BAD_ROWS: dict[str, tuple[str, bytes, str]] = {
    "no rows": ("x.jsonl", b"\n\n", "x.jsonl: the calibration text is empty: 0 rows"),
    "all null": (
        "x.jsonl",
        b'{"text": null}\n{"text": ""}',
        "x.jsonl: the calibration text is empty: 0 rows of 'text'; skipped: 2 empty",
    ),
    "empty array": ("x.json", b"[]", "x.json: the calibration text is empty: 0 rows"),
    "empty json": ("x.json", b"", "x.json: the calibration text is empty: 0 rows"),
    "empty gzip": ("x.jsonl.gz", b"", "x.jsonl.gz: the calibration text is empty: 0 rows"),
    "empty text": ("x.txt", b"", "x.txt: the calibration text is empty: no characters"),
    "blank text": ("x.txt", b" \n", "x.txt: the calibration text is empty: no characters"),
    "empty parquet": ("x.parquet", b"", "x.parquet: cannot read the data set: "),
    "empty csv": ("x.csv", b"", "x.csv: cannot read the data set: "),
    "truncated": (
        "x.jsonl",
        b'{"text": "a"}\n\n{"text": "b',
        "x.jsonl: line 3: a JSON object expected: Unterminated string",
    ),
    "truncated array": (
        "x.json",
        b'[\n{"text": "a"},\n{"text":\n "b"}\n',
        "x.json: line 5: ] expected after a row, found the end of the file",
    ),
    "truncated row": (
        "x.json",
        b'[\n{"text": "a"},\n{"text":\n "b',
        "x.json: line 3: a JSON object expected: Unterminated string",
    ),
    "trailing comma": ("x.json", b'[{"text": "a"},]', "x.json: line 1: a JSON object expected: "),
    "no comma": (
        "x.json",
        b'[{"text": "a"}\n{"text": "b"}]',
        "x.json: line 2: ] expected after a row, found {",
    ),
    "after the array": (
        "x.json",
        b'[{"text": "a"}]\n[1]',
        "x.json: line 2: the end of the file expected after a row, found [",
    ),
    "no JSON": ("x.jsonl", b"some text\n", "x.jsonl: line 1: a JSON object expected: Expecting"),
    "array in lines": (
        "x.jsonl",
        b'[{"text": "a"}]\n',
        "x.jsonl: line 1: a JSON object with columns expected, got list",
    ),
    "numbers": (
        "x.json",
        b"[1, 2]",
        "x.json: line 1: a JSON object with columns expected, got int",
    ),
    "long number": (
        "x.jsonl",
        b'{"text": 1' + b"0" * 5000 + b"}",
        "x.jsonl: line 1: a JSON object",
    ),
    "nested": ("x.jsonl", b"[" * 200_000, "x.jsonl: line 1: a JSON object expected: "),
    "nested array": ("x.json", b"[" * 200_000, "x.json: line 1: a JSON object expected: "),
    "no UTF-8": ("x.jsonl", b'{"text": "\xff"}\n', "x.jsonl: line 1: UTF-8 text expected"),
    "no UTF-8 array": ("x.json", b'[{"text": "\xff"}]', "x.json: line 1: UTF-8 text expected"),
    "UTF-16": ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "x.jsonl: line 1: UTF-8 text expected"),
    "other columns": (
        "x.jsonl",
        b'{"id": 1, "body": "x"}',
        "x.jsonl: line 1: a column 'text', 'messages' or 'conversations' expected, found id, body",
    ),
    "columns change": (
        "x.jsonl",
        b'{"text": "a"}\n{"messages": []}\n',
        "x.jsonl: line 2: a column 'text' expected, found messages; --calibration-column ",
    ),
    "many columns": (
        "x.jsonl",
        json.dumps({f"a\n{n}": 1 for n in range(100_000)}).encode(),
        r"x.jsonl: line 1: a column 'text', 'messages' or 'conversations' expected, found a\n0",
    ),
    "a number": (
        "x.jsonl",
        b'{"text": 3}',
        "x.jsonl: line 1: text: text or chat messages expected, got int",
    ),
    "a text": (
        "x.jsonl",
        b'{"messages": "[]"}',
        "x.jsonl: line 1: messages: chat messages expected, got text",
    ),
    "no message": (
        "x.jsonl",
        b'{"messages": ["hi"]}',
        "x.jsonl: line 1: messages: message 0: an object expected, got str",
    ),
    "no role": (
        "x.jsonl",
        b'{"messages": [{"role": "user", "content": "hi"}, {"speaker": "me", "says": "hi"}]}',
        "x.jsonl: line 1: messages: message 1: a text 'role' or 'from' expected, found",
    ),
    "no content": (
        "x.jsonl",
        b'{"messages": [{"role": "user"}]}',
        "x.jsonl: line 1: messages: message 0: 'content' or 'value' expected",
    ),
    "an image": (
        "x.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
        "x.jsonl: line 1: messages: message 0: content: parts of type 'text' expected",
    ),
    "lists of unlike lengths": (
        "x.jsonl",
        b'{"messages": {"role": ["user"], "content": []}}',
        "x.jsonl: line 1: messages: ",
    ),
    "damaged gzip": ("x.jsonl.gz", b"no gzip", "x.jsonl.gz: cannot read the calibration text: "),
    "truncated gzip": (
        "x.json.gz",
        gzip.compress(b'[{"text": "a"}]' * 99)[:-9],
        "x.json.gz: cannot read the calibration text: ",
    ),
    "zero bytes": (
        "x.txt",
        b"a\0b",
        "x.txt: cannot read the calibration text: UTF-8 text expected (byte 1: a zero byte)",
    ),
}


@pytest.mark.parametrize(("name", "data", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_one_line(name: str, data: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as refused:
        read(tmp_path / name)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path}/{expected}")
    assert message.isprintable()
    assert len(message) <= 1100


def test_files_of_a_folder_that_differ_in_columns_are_named(tmp_path: Path) -> None:
    for ending, write in (("jsonl", _jsonl), ("csv", _csv), ("parquet", _parquet)):
        folder = tmp_path / ending
        folder.mkdir()
        write(folder / f"1.{ending}", [{"text": "a"}])
        write(folder / f"2.{ending}", [{"body": "b", "id": "1"}])
        with pytest.raises(InputError, match=rf"/2\.{ending}.*'text' expected, found body, id; "):
            read(folder)


def test_what_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for path, reason in (
        (tmp_path / "none.jsonl", "No such file or directory"),
        (tmp_path / "file.txt" / "x", "Not a directory"),
        (tmp_path / "circle", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(InputError) as refused:
            read(path)
        assert str(refused.value) == f"{path}: cannot read the calibration text: {reason}"


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "folder", "folder/inner"])
def test_what_may_not_be_read_is_one_line(name: str) -> None:
    # pytest's own directories would be closed to the other user, too.
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        closed = Path(temporary, name)
        if "folder" in name:
            closed.mkdir(parents=True)
        else:
            closed.write_text("x")
        closed.chmod(0)
        root = os.geteuid() == 0
        if root:  # whom nothing is forbidden
            os.seteuid(65534)
        try:
            with pytest.raises(InputError) as refused:
                read(Path(temporary, name.split("/")[0]))
        finally:
            if root:
                os.seteuid(0)
            closed.chmod(0o755)
    message = str(refused.value)
    assert message.startswith(str(closed))
    assert message.endswith(": cannot read the calibration text: Permission denied")


def test_a_column_of_no_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("body\ttext\nx\ty\n")
    with pytest.raises(InputError, match=r"--calibration-column .* files of rows expected, ending"):
        read(tmp_path / "x.tsv", "body")
    (tmp_path / "x.jsonl").write_text('{"body": "z"}')
    texts = read_texts([tmp_path / "x.tsv", tmp_path / "x.jsonl"], "body")
    assert [text.content for text in texts] == ["body\ttext\nx\ty\n", "z"]


def test_a_model_without_a_template_takes_no_chats(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(lines([{"messages": OPENAI}]))
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "p.json")]
    assert tune.main([*arguments, "--lengths", "128", "256", "--calibration", str(chats)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"vllm-afbs-tune: error: {chats}: line 1: messages: chats expect a model with a chat "
        "template, this one has none: give plain text or a column of text"
    ]
    with pytest.raises(InputError, match="chats expect a model with a chat template"):
        read_texts([chats])
