"""Calibration texts from folders of source files, and from files too large to be read whole."""

import gzip
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from vllm_afbs.captures import CALIBRATION
from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts import Text, read_texts
from vllm_afbs.tuning.windows import cut_tokens

MIB = 1 << 20
LARGE_BYTES = 300 * MIB
ROW_BYTES = 1000
NUM_ROWS = LARGE_BYTES // ROW_BYTES


def read(path: Path) -> Text:
    (text,) = read_texts([path])
    return text


@pytest.mark.parametrize(
    "data",
    [
        b"a\r\nb\rc\n",
        "\ufeffä\u2028b\x0b\x0c".encode(),
        b"\n \n x",
        b"no end",
        "漢字🙂".encode() * 9999,
    ],
    ids=["line ends", "other line ends", "blank", "no end", "wide"],
)
def test_a_plain_file_is_what_python_reads(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(data)
    assert read(path) == Text(str(path), path.read_text(encoding="utf-8"), None)


def _source_folder(folder: Path) -> None:
    for name, data in {
        "b.py": b"print(1)\r\n",
        "a/z.c": "int ä;".encode(),
        "a/b/c.rs": b"fn main() {}",
        "a.md": b"# a",
        "package.json": b'{\n "text": "no row"\n}',
        "LICENSE": b"free",
        "empty/__init__.py": b"",
        "image.png": b"\x89PNG\r\n\0",
        "latin.txt": b"\xe4" + b"x" * 9,
        "late.txt": b"x" * 9000 + b"\xe4",
        "weights.bin": b"w" * 9000 + b"\0",
        ".git/HEAD": b"ref",
        ".env": b"secret",
        "a/.hidden/x.py": b"hidden",
        "tests/data/few.jsonl": b'{"text": "fixture"}\n',
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "circle").symlink_to(folder)
    (folder / "dangling").symlink_to(folder / "none")
    os.mkfifo(folder / "pipe")


def test_a_folder_of_source_files_is_text(tmp_path: Path) -> None:
    folder = tmp_path / ".code"
    _source_folder(folder)
    text = read(folder)
    # In the order of their paths.
    assert text.content == "\n\n".join(
        ["free", "# a", "fn main() {}", "int ä;", "print(1)\n", '{\n "text": "no row"\n}']
    )
    assert text.coverage == (
        "7 text files; files skipped: 3 hidden, 1 of rows, 4 that are no UTF-8 text"
    )
    assert read_texts([folder], "text")[0].content == "fixture"


def test_a_folder_whose_rows_outweigh_its_sources_says_how_to_read_these(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("x,y\n" + "1,2\n" * 99)
    (tmp_path / "source.py").write_text("print(1)")
    expected = r"'text', .* found x, y; .*; most of the folder is rows, give its source files apart"
    with pytest.raises(InputError, match=expected):
        read(tmp_path)
    assert read(tmp_path / "source.py").content == "print(1)"


def test_an_empty_file_of_rows_in_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(InputError, match="text is empty: 0 rows; 1 jsonl file"):
        read(tmp_path)


@pytest.mark.parametrize(
    "rows", ['{"text": "a"}\n{"text": "b"}', '[ {"text": "a"}, {"text": "b"}]']
)
def test_a_folder_of_rows_beside_notes_is_a_data_set(rows: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(rows)
    (tmp_path / "README.md").write_text("A long description. " * 99)
    (tmp_path / ".gitattributes").write_text("*.json lfs")
    (tmp_path / "x.py").write_text("pass")
    text = read(tmp_path)
    assert text.content == "a\n\nb"
    assert text.coverage == "2 rows of 'text'; 1 json file; files skipped: 1 hidden, 2 other"


FILLING = "x" * (ROW_BYTES - 30)


def _lines(path: Path) -> None:
    _write(path, (f"{number:010} {FILLING}\n" for number in range(NUM_ROWS)))


def _json_lines(path: Path) -> None:
    _write(path, (f'{{"text": "{number:010} {FILLING}"}}\n' for number in range(NUM_ROWS)))


def _json_array(path: Path) -> None:
    rows = (f'{{"text": "{number:010} {FILLING}"}},\n' for number in range(NUM_ROWS))
    _write(path, chain(["["], rows))


def _write(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", buffering=MIB) as file:
        file.writelines(lines)


def _parquet(path: Path) -> None:
    """Ten groups, with another column that is much larger than the text."""
    schema = pyarrow.schema([("blob", pyarrow.binary()), ("text", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none") as file:
        blob = os.urandom(10_000)
        for group in range(10):
            numbers = range(group * 3000, group * 3000 + 3000)
            texts = [f"{n:010} {FILLING}" for n in numbers]
            blobs = [n.to_bytes(8) + blob for n in numbers]
            file.write_table(pyarrow.table([blobs, texts], schema=schema))


def _numbers(text: Text) -> list[int]:
    return [int(row[:10]) for row in text.content.splitlines() if row]


@pytest.mark.parametrize(
    ("name", "write", "first_of_parts"),
    [
        ("text.txt", _lines, 5),
        ("rows.jsonl", _json_lines, 5),
        ("rows.parquet", _parquet, 5),
        ("rows.json", _json_array, 1),
    ],
)
def test_of_a_large_file_spread_parts_are_read(
    name: str, write: Callable[[Path], None], first_of_parts: int, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    assert path.stat().st_size > 0.9 * LARGE_BYTES
    process = psutil.Process()
    before, start = process.io_counters().read_chars, time.perf_counter()
    tracemalloc.start()
    try:
        text = read(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    seconds = time.perf_counter() - start
    assert process.io_counters().read_chars - before < 60 * MIB
    assert peak_bytes < 120 * MIB
    assert seconds < 30
    assert 15 * MIB < len(text.content) < 18 * MIB

    numbers = _numbers(text)
    assert numbers == sorted(set(numbers))
    starts = [n for previous, n in zip([-2, *numbers], numbers, strict=False) if n != previous + 1]
    num_rows = 30_000 if write is _parquet else NUM_ROWS
    assert starts == [
        pytest.approx(num_rows * part / first_of_parts, abs=2) for part in range(first_of_parts)
    ]
    assert text.coverage is not None
    told = "parts" if first_of_parts == 5 else "only the first ones are read"
    assert told in text.coverage

    # The windows of the tuner lie in different parts, and share nothing.
    cut = cut_tokens([numbers], [name], [], 1000)
    calibration, *held_out = cut.windows.values()
    assert next(iter(cut.windows)) == CALIBRATION
    assert calibration == list(range(1000))
    if first_of_parts == 5:
        for window, part in zip(held_out, (1, 3), strict=True):
            assert window == list(range(window[0], window[0] + 1000))
            assert num_rows * part / 5 < window[0] < num_rows * (part + 1) / 5


def test_of_a_large_folder_spread_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_afbs.tuning.texts.spread.MAX_CHARACTERS", 1000)
    monkeypatch.setattr("vllm_afbs.tuning.texts.plain.MAX_CHARACTERS", 1000)
    for number in range(100):
        (tmp_path / f"{number:02}.py").write_text(f"{number:02}\n" * 40)
    text = read(tmp_path)
    assert {int(line) for line in text.content.split()} == {
        *(0, 1, 20, 21, 40, 41, 60, 61, 80, 81),
    }
    assert len(text.content) <= 1000 + 5 * 2 * 2
    assert text.coverage == (
        "100 text files, of them 5 parts of 200 bytes each, spread evenly over 11.72 KiB"
    )


@pytest.mark.parametrize("letter", ["x", "ä", "漢", "🙂"])
@pytest.mark.parametrize("shift", range(4))
def test_a_long_line_is_cut_between_characters(
    letter: str, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_afbs.tuning.texts.spread.MAX_CHARACTERS", 1000)
    monkeypatch.setattr("vllm_afbs.tuning.texts.plain.MAX_CHARACTERS", 1000)
    path = tmp_path / "line.txt"
    path.write_text("y" * shift + letter * 5000, encoding="utf-8")
    assert set(read(path).content) <= {letter, "y", "\n"}
    assert 900 < len(read(path).content.encode()) <= 1008


def test_rows_of_little_text_are_read_on_for(tmp_path: Path) -> None:
    """A quarter of the bytes is not enough to fill the characters."""
    path = tmp_path / "rows.jsonl"
    row = f'", "v": "{"9" * 60_000}"}}\n'
    _write(path, (f'{{"text": "{number:010} {FILLING}{row}' for number in range(5000)))
    text = read(path)
    assert path.stat().st_size > 290 * MIB
    # 128 MiB of rows of 61,000 bytes.
    assert 2000 < len(_numbers(text)) < 2300


@pytest.mark.parametrize(
    ("name", "filling"),
    [("x.jsonl", b"\n"), ("x.jsonl", b'{"text":""}\n'), ("x.json", b" ")],
)
def test_much_of_nothing_ends_soon(name: str, filling: bytes, tmp_path: Path) -> None:
    """A compressed file of 1 MiB can be gigabytes of empty rows."""
    path = tmp_path / f"{name}.gz"
    block = filling * (4 * MIB // len(filling))
    path.write_bytes(gzip.compress(block) * 100)
    start = time.perf_counter()
    with pytest.raises(InputError, match="the calibration text is empty: 0 rows"):
        read(path)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_a_row_too_long_to_hold_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_afbs.tuning.texts.json_rows.MAX_ROW_BYTES", 3 * MIB)
    path = tmp_path / name
    data = b'{"text": "a"}\n{"text": "' + b"x" * 20 * MIB
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    monkeypatch.setattr("vllm_afbs.tuning.texts.spread.MAX_CHARACTERS", 100 * MIB)
    with pytest.raises(InputError) as refused:
        read(path)
    assert str(refused.value) == f"{path}: line 2: a row of at most 3 MiB expected"


def test_in_the_midst_of_a_large_file_the_byte_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_afbs.tuning.texts.spread.MAX_CHARACTERS", 1000)
    path = tmp_path / "x.jsonl"
    rows = [b'{"text": "%030d"}\n' % number for number in range(500)]
    at = sum(map(len, rows[:101]))
    rows[101] = b"no JSON" + b" " * 30 + b"\n"
    path.write_bytes(b"".join(rows))
    with pytest.raises(InputError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: byte {at}: a JSON object expected: ")


def test_a_pipe_is_read_from_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data, expected in (
        ("rows.jsonl", b'{"text": "a"}\n' * 3, "a\n\na\n\na"),
        ("text", b"a\nb\n" * 200, "a\nb\n" * 200),
        ("long", b"a\nb\n" * 2000, "a\nb\n" * 250),
    ):
        pipe = tmp_path / name
        os.mkfifo(pipe)
        writer = threading.Thread(target=_feed, args=(pipe, data))
        writer.start()
        with monkeypatch.context() as patched:
            patched.setattr("vllm_afbs.tuning.texts.plain.MAX_CHARACTERS", 1000)
            text = read(pipe)
        writer.join()
        assert text.content == expected
        coverage = {"rows.jsonl": "3 rows of 'text'", "long": "the first 1000 bytes"}
        assert text.coverage == coverage.get(name)


def _feed(pipe: Path, data: bytes) -> None:
    with suppress(BrokenPipeError):  # no more was wanted
        pipe.write_bytes(data)
