"""Whatever a calibration file holds, it is read or refused in one line."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.chat_tokenizers import chat_tokenizer
from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts import Text, read_texts
from vllm_afbs.tuning.windows import tokenize

TOKENIZER = chat_tokenizer()
NAMES = (
    "x.jsonl",
    "x.json",
    "x.jsonl.gz",
    "x.json.gz",
    "x.txt",
    "x.parquet",
    "x.csv",
    "state.json",
)
# Every letter, halves of surrogate pairs too, which JSON can spell.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "system"]) | VALUES,
            "from": st.sampled_from(["human", "gpt"]) | VALUES,
            "content": TEXTS
            | st.lists(st.fixed_dictionaries({"text": TEXTS}), max_size=2)
            | VALUES,
            "value": TEXTS,
            "tool_calls": VALUES,
        },
    )
    | VALUES,
    max_size=3,
)
CHATS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": TEXTS}),
    max_size=3,
)
GOOD_ROWS = st.one_of(
    st.lists(st.fixed_dictionaries({"text": TEXTS | st.none()}), max_size=4),
    st.lists(st.fixed_dictionaries({"messages": CHATS | st.none()}), max_size=4),
)
ROWS = st.fixed_dictionaries(
    {}, optional={"text": TEXTS | VALUES, "messages": MESSAGES, "conversations": MESSAGES}
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Rows as lines or as an array, often damaged somewhere, or anything at all."""
    rows = draw(GOOD_ROWS | GOOD_ROWS | st.lists(ROWS | VALUES, max_size=4))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    text = draw(
        st.sampled_from(["\n".join(lines), f"[{','.join(lines)}]", json.dumps(rows, indent=1)])
    )
    data = text.encode("utf-8", "surrogatepass")
    at = draw(st.integers(0, len(data)))
    damage = draw(st.sampled_from(["none", "none", "none", "cut", "insert", "other"]))
    if damage == "cut":
        return data[:at]
    if damage == "insert":
        return data[:at] + draw(st.binary(max_size=4)) + data[at:]
    return data if damage == "none" else draw(st.binary(max_size=200))


def read_or_refuse(paths: Sequence[Path], column: str | None = None) -> None:
    texts: list[Text] = []
    message = ""
    try:
        texts = read_texts(paths, column, lambda: TOKENIZER)
    except InputError as refused:
        message = str(refused)
    event("refused" if message else "read")
    assert bool(texts) != bool(message)
    assert message.isprintable()  # which the end of a line is not
    assert len(message) <= 10_000
    for text in texts:
        assert text.content.strip()
        assert len(text.sha256) == 64
        assert (text.coverage or "x").isprintable()
        assert tokenize(TOKENIZER, text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(NAMES[:5]), files(), min_size=1, max_size=2),
    st.sampled_from([None, None, None, "text", "messages", "other"]),
    st.booleans(),
)
def test_any_file_is_read_or_refused(
    folder: Path, contents: dict[str, bytes], column: str | None, as_folder: bool
) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, data in contents.items():
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    read_or_refuse([folder] if as_folder else sorted(folder.iterdir()), column)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(NAMES), st.binary(max_size=300) | files(), st.booleans())
def test_any_file_of_a_library_is_read_or_refused(
    folder: Path, name: str, data: bytes, as_folder: bool
) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(data)
    read_or_refuse([folder] if as_folder else [folder / name])


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    path = folder / "x.parquet"
    if not (folder / "whole.bin").exists():
        rows: list[dict[str, Any]] = [{"text": f"row {n}" * 9, "n": n} for n in range(50)]
        Dataset.from_list(rows).to_parquet(path)
        path.rename(folder / "whole.bin")
    damaged = bytearray((folder / "whole.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))])
    read_or_refuse([path])
