"""Profiles are refused unless they are whole, known and the model's."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from tests import hybrids
from tests.profiles import SMALL_MODEL, uniform_profile
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.layers import full_layers


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


LEVEL = json.loads(uniform_profile().to_json())["layers"][0]["levels"][0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_set(["schema_version"], 1), "schema_version: 2, 3 or 4 expected, got 1"),
        (_set(["schema_version"], 5), "schema_version: 2, 3 or 4 expected, got 5"),
        (
            _set(["layers", 0, "levels", 0, "heads", 1, "tau"], float("nan")),
            "layers.0.levels.0.heads.1.tau",
        ),
        (_set(["layers", 0, "levels", 0, "heads", 1, "tau"], 0.0), "layers.0.levels.0.heads.1.tau"),
        (_set(["layers", 1, "levels", 0, "heads"], LEVEL["heads"][:1]), "heads: 4 expected by"),
        (_set(["layers"], [{"levels": []}] * 2), "layers: levels expected in one of them"),
        (_set(["layers", 1, "levels"], [LEVEL] * 2), "layers.1.levels: 1 expected, one for each"),
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


def test_layers_without_full_attention_have_no_heads(stored: Path) -> None:
    data = json.loads(stored.read_text())
    data["layers"][1]["levels"] = []
    stored.write_text(json.dumps(data))
    profile = load_profile(stored)
    assert profile.full_layers == [0]
    assert len(profile.heads_of(0)) == profile.num_tuned_heads == 4


SHAPES = {"gemma-4": (4, 1, 64), "qwen-3-next": (4, 2, 64)}
"""Heads, KV heads and head size of the full layers; of all other models 4, 2 and 32."""


@pytest.mark.parametrize("name", hybrids.CONFIGS)
def test_the_fingerprint_is_of_the_layers_with_full_attention(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hybrids.config(name)))
    config = AutoConfig.from_pretrained(tmp_path)
    model = ModelFingerprint.from_config(config)
    assert model.num_layers == hybrids.CONFIGS[name]["num_hidden_layers"]
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == SHAPES.get(name, (4, 2, 32))
    assert not any(isinstance(value, dict) for value in model.rope.values())
    assert full_layers(config.get_text_config()) == hybrids.full_layers(name)
    if name == "gemma-3":
        assert model.rope == {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"}


def test_the_heads_of_full_layers_are_also_found_where_transformers_knows_no_layers() -> None:
    config = LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config.global_head_dim, config.num_global_key_value_heads = 64, 1
    for same_projection, num_kv_heads in ((True, 1), (False, 2)):
        config.attention_k_eq_v = same_projection
        model = ModelFingerprint.from_config(config)
        assert (model.num_kv_heads, model.head_dim) == (num_kv_heads, 64)
