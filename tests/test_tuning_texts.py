"""Calibration texts: files and data sets as they are read, and the windows cut from them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from vllm_afbs.captures import CALIBRATION
from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import by_text, cut_tokens, held_out

ROWS = ["first\nrow", "second row", "dritte Zeile äöü"]
CONTENT = "\n\n".join(ROWS)


def _save_to_disk(directory: Path) -> None:
    Dataset.from_dict({"id": [1, 2, 3], "text": ROWS}).save_to_disk(directory)


def _save_splits_to_disk(directory: Path) -> None:
    splits = {"train": ROWS[:2], "test": ROWS[2:]}
    DatasetDict(
        {name: Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    ).save_to_disk(directory)


def _parquet(directory: Path) -> None:
    (directory / "data").mkdir(parents=True)
    for index in (0, 1):
        rows = ROWS[:2] if index == 0 else ROWS[2:]
        file = directory / "data" / f"part-{index}.parquet"
        Dataset.from_dict({"text": rows}).to_parquet(file)
    # What a clone from the hub carries; its README would send the reader to another machine.
    (directory / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: https://192.0.2.1/x.parquet\n---\n"
    )
    (directory / "dataset_infos.json").write_text('{"default": {}}')


def _json_lines(directory: Path) -> None:
    directory.mkdir()
    lines = [json.dumps({"text": row, "n": index}) for index, row in enumerate(ROWS)]
    (directory / "rows.jsonl").write_text("\n".join(lines))


def _json(directory: Path) -> None:
    directory.mkdir()
    (directory / "rows.json").write_text(json.dumps([{"text": row} for row in ROWS]))


def _csv(directory: Path) -> None:
    directory.mkdir()
    Dataset.from_dict({"text": ROWS}).to_csv(directory / "rows.csv")


def _txt(directory: Path) -> None:
    directory.mkdir()
    for index, row in enumerate(ROWS):
        (directory / f"{index}.txt").write_text(row, encoding="utf-8")


@pytest.mark.parametrize(
    "write",
    [_save_to_disk, _save_splits_to_disk, _parquet, _json_lines, _json, _csv, _txt],
    ids=lambda write: write.__name__.strip("_"),
)
def test_a_data_set_is_its_rows(write: Callable[[Path], None], tmp_path: Path) -> None:
    directory = tmp_path / "set"
    write(directory)
    (text,) = read_texts([directory])
    assert (text.name, text.content) == (str(directory), CONTENT)
    assert text.coverage is not None
    assert text.coverage.startswith("3 text files" if write is _txt else "3 rows of 'text'")


def test_of_a_large_data_set_only_the_first_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_afbs.tuning.texts.spread.MAX_CHARACTERS", 10)
    _save_to_disk(tmp_path / "set")
    (text,) = read_texts([tmp_path / "set"])
    assert text.content == "\n\n".join(ROWS[:2])
    assert text.coverage == "2 rows of 'text'; only the first ones are read"


def test_several_texts_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("bbb", encoding="utf-8")
    _json(tmp_path / "a")
    assert [text.content for text in read_texts([tmp_path / "b", tmp_path / "a"])] == [
        "bbb",
        CONTENT,
    ]
    (own,) = read_texts([])
    assert own.name.startswith("pydoc_data.topics of Python 3.")


def _other_column(directory: Path) -> str:
    Dataset.from_dict({"id": [1], "body": ["x"]}).save_to_disk(directory)
    return (
        "row 0: a column 'text', 'messages' or 'conversations' expected, found id, body; "
        "--calibration-column (of evaluate: --text-column) names the one to read"
    )


def _numbers(directory: Path) -> str:
    Dataset.from_dict({"text": [3]}).save_to_disk(directory)
    return "row 0: text: text or chat messages expected, got int"


def _damaged_parquet(directory: Path) -> str:
    directory.mkdir()
    (directory / "x.parquet").write_bytes(b"PAR1 no more")
    return "x.parquet: cannot read the data set: "


def _damaged_json(directory: Path) -> str:
    directory.mkdir()
    (directory / "x.jsonl").write_text('{"text": "a"}\n{"te')
    return "x.jsonl: line 2: a JSON object expected: Unterminated string"


def _damaged_state(directory: Path) -> str:
    _save_to_disk(directory)
    (directory / "state.json").write_text("{}")
    return "cannot read the data set: "


def _binary_txt(directory: Path) -> str:
    directory.mkdir()
    (directory / "x.txt").write_bytes(b"\xff\xfe\x00")
    return "the calibration text is empty: 0 text files; files skipped: 1 that are no UTF-8 text"


def _no_data(directory: Path) -> str:
    directory.mkdir()
    (directory / ".hidden.py").write_text("raise SystemExit")
    return "a data set expected: one saved by save_to_disk, or files ending in parquet, jsonl"


@pytest.mark.parametrize(
    "write",
    [
        _other_column,
        _numbers,
        _damaged_parquet,
        _damaged_json,
        _damaged_state,
        _binary_txt,
        _no_data,
    ],
    ids=lambda write: write.__name__.strip("_"),
)
def test_a_bad_data_set_is_one_line(write: Callable[[Path], str], tmp_path: Path) -> None:
    directory = tmp_path / "set"
    expected = write(directory)
    with pytest.raises(InputError) as refused:
        read_texts([directory])
    named = directory / expected if expected.startswith("x.") else f"{directory}: {expected}"
    assert str(refused.value).startswith(str(named))
    assert "\n" not in str(refused.value)


def test_without_the_extra_a_data_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _parquet(tmp_path / "parquet")
    _csv(tmp_path / "csv")
    _save_to_disk(tmp_path / "saved")
    _json_lines(tmp_path / "jsonl")
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for kind in ("parquet", "csv", "saved"):
        with pytest.raises(InputError, match=r"pip install 'vllm-afbs\[datasets\]'"):
            read_texts([tmp_path / kind])
    assert read_texts([tmp_path / "jsonl"])[0].content == CONTENT


@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    length=st.integers(2, 60),
    prefix=st.sampled_from([[], [-1]]),
)
def test_windows_take_equal_shares_and_share_nothing(
    sizes: list[int], length: int, prefix: list[int]
) -> None:
    tokens = [[1000 * index + position for position in range(n)] for index, n in enumerate(sizes)]
    names = [f"text {index}" for index in range(len(sizes))]
    body = length - len(prefix)
    shares = [len(part) for part in _split(list(range(body)), len(sizes))]
    short = [n for n, share in zip(sizes, shares, strict=True) if n < share + body]
    if short:
        with pytest.raises(InputError, match=rf"text \d: the calibration text has {short[0]} "):
            cut_tokens(tokens, names, prefix, length)
        return

    cut = cut_tokens(tokens, names, prefix, length)
    assert list(cut.windows) == [CALIBRATION, *held_out(len(sizes))]
    assert all(len(window) == length for window in cut.windows.values())
    assert all(window[: len(prefix)] == prefix for window in cut.windows.values())
    calibration = cut.windows[CALIBRATION][len(prefix) :]
    assert calibration == [
        token for text, share in zip(tokens, shares, strict=True) for token in text[:share]
    ]
    groups = by_text(held_out(len(sizes)))
    assert sum(len(group) for group in groups) >= 2
    for text, group, num_tokens in zip(tokens, groups, cut.num_tokens, strict=True):
        seen = set(text) & set(calibration)
        for window in group:
            held = cut.windows[window][len(prefix) :]
            assert held == text[text.index(held[0]) :][:body]
            assert not set(held) & set(calibration)
            seen |= set(held)
        assert num_tokens == len(seen)


def _split(items: list[int], parts: int) -> list[list[int]]:
    """Parts whose sizes differ by one at most, the larger ones first."""
    return [items[index::parts] for index in range(parts)]


def test_held_out_windows_of_one_text_are_spread_over_its_rest() -> None:
    cut = cut_tokens([list(range(100))], ["text"], [-1], 11)
    assert cut.windows == {
        "calibration": [-1, *range(10)],
        "validation-0-0": [-1, *range(30, 40)],
        "validation-0-1": [-1, *range(70, 80)],
    }
