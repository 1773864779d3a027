"""Calibration texts that cannot be used: one line each, which names the file and the place."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytest

from tests.chat_tokenizers import chat_tokenizer
from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts import Text, read_texts


def read(path: Path) -> Text:
    (text,) = read_texts([path], None, chat_tokenizer)
    return text


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
