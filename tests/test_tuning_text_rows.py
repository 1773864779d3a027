"""Calibration texts that are rows: JSON, Parquet and CSV files, columns and chats."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.chat_tokenizers import chat_tokenizer
from vllm_afbs.errors import InputError
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


def test_files_of_a_folder_that_differ_in_columns_are_named(tmp_path: Path) -> None:
    for ending, write in (("jsonl", _jsonl), ("csv", _csv), ("parquet", _parquet)):
        folder = tmp_path / ending
        folder.mkdir()
        write(folder / f"1.{ending}", [{"text": "a"}])
        write(folder / f"2.{ending}", [{"body": "b", "id": "1"}])
        with pytest.raises(InputError, match=rf"/2\.{ending}.*'text' expected, found body, id; "):
            read(folder)


def test_a_column_of_no_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("body\ttext\nx\ty\n")
    with pytest.raises(InputError, match=r"--calibration-column .* files of rows expected, ending"):
        read(tmp_path / "x.tsv", "body")
    (tmp_path / "x.jsonl").write_text('{"body": "z"}')
    texts = read_texts([tmp_path / "x.tsv", tmp_path / "x.jsonl"], "body")
    assert [text.content for text in texts] == ["body\ttext\nx\ty\n", "z"]
