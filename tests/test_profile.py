"""Profiles are refused unless they are whole, known and the model's."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.profiles import SMALL_MODEL, uniform_profile
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    write_atomically(path, uniform_profile().to_json())
    return path


def test_a_written_profile_reads_back_equal(stored: Path) -> None:
    assert load_profile(stored) == uniform_profile()
    assert load_profile(stored).profile_id == uniform_profile().profile_id


def _set(path: list[Any], value: Any) -> Any:
    def change(data: dict[str, Any]) -> None:
        target: Any = data
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set(["schema_version"], 1), "schema_version: 2 expected, got 1"),
        (_set(["layers", 0, "heads", 1, "tau"], float("nan")), "layers.0.heads.1.tau"),
        (_set(["layers", 0, "heads", 1, "tau"], 0.0), "layers.0.heads.1.tau"),
        (_set(["layers", 1, "heads"], []), "layers.1.heads: 4 expected"),
        (_set(["layers"], []), "layers: 2 expected"),
        (_set(["model", "head_dim"], "wide"), "model.head_dim"),
        (_set(["thresholds"], 1), "thresholds"),
        (_set(["max_seq_len"], 5), "min_seq_len: at most max_seq_len expected"),
    ],
)
def test_a_wrong_field_is_named(stored: Path, change: Any, named: str) -> None:
    data = json.loads(stored.read_text())
    change(data)
    stored.write_text(json.dumps(data))
    with pytest.raises(ProfileError) as caught:
        load_profile(stored)
    assert str(caught.value).startswith(f"{stored}: ")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_heads", 8), ("head_dim", 64), ("rope.rope_theta", 5.0), ("num_layers", 3)],
)
def test_another_model_is_refused_with_the_field(field: str, value: Any) -> None:
    name, _, key = field.partition(".")
    update = {name: {**SMALL_MODEL.rope, key: value} if key else value}
    other = SMALL_MODEL.model_copy(update=update)
    with pytest.raises(ProfileError, match=rf"p\.json: .*model\.{field} is .* in the profile"):
        uniform_profile().check_model(other, "p.json")


def test_fingerprint_of_a_hugging_face_config() -> None:
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=128
    )
    config.architectures = ["LlamaForCausalLM"]
    assert ModelFingerprint.from_config(config) == SMALL_MODEL
