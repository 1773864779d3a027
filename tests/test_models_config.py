"""Whatever a config.json holds: a model that can be tuned, or one line that names the field."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.layers import make_impl
from tests.models import changed_model
from tests.profiles import SMALL_MODEL, uniform_profile
from tests.tuning_jobs import command, where
from vllm_afbs import tune
from vllm_afbs.commands.tuning_options import tuning_parser
from vllm_afbs.errors import InputError
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import SourceModel, open_model
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.texts import Text
from vllm_afbs.tuning.windows import cut_windows

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def captured(model: SourceModel, folder: Path, length: int = 64) -> None:
    """Loads the weights and runs the model, as the tuner does first."""
    cut = cut_windows(model.tokenizer(), [Text("text", "some text " * 50)], length)
    capture(model, TransformersEngine(model), cut.windows, range(2), folder, lambda _: None)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads: a whole number from 1 to "),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: a whole number from 1 to "),
        ({"num_hidden_layers": True}, "num_hidden_layers: a whole number from 1 to "),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: a whole number from 1 to "),
        ({"num_key_value_heads": 3}, "num_key_value_heads: a divisor of num_attention_heads (4)"),
        ({"num_key_value_heads": [2, 2]}, "num_key_value_heads: a whole number from 1 to "),
        ({"head_dim": -1}, "head_dim: a whole number from 1 to 2147483648 expected, got -1"),
        ({"max_position_embeddings": "1024"}, "max_position_embeddings: a whole number"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": "256"}, "vocab_size: a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rope_parameters": "yarn"}, "rope_parameters: an object expected, got 'yarn'"),
        ({"rope_scaling": [1]}, "rope_scaling: an object expected"),
        ({"quantization_config": 4}, "quantization_config: an object expected, got 4"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: a list of names expected"),
        ({"architectures": [None]}, "architectures: a list of names expected"),
        ({"architectures": []}, "architectures: a decoder-only causal language model expected"),
        (
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types: full_attention expected in some layer, got sliding_attention",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "of_tomorrow"}, "of_tomorrow"),
        ({"model_type": None}, "model_type: a name expected, got None"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config: null"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}, "factor"),
        # Up to the model's positions both are alike; beyond them each has its own.
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: another type than dynamic expected",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(
    fields: dict[str, Any], named: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = changed_model(tiny_model, tmp_path / "model", **fields)
    with pytest.raises(InputError) as refused:
        captured(open_model(str(model)), tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{model}: ")
    assert named in line
    assert "\n" not in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cannot read config.json: "),
        (b"[]", "config.json: a JSON object expected"),
        (b"[" * 100_000, "cannot read config.json: "),
        (b"\xff\xfe", "cannot read config.json: "),
    ],
    ids=["empty", "list", "deep", "binary"],
)
def test_what_is_no_configuration_is_refused(
    content: bytes, named: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = changed_model(tiny_model, tmp_path / "model")
    (model / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=named):
        open_model(str(model))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = changed_model(
        tiny_model,
        tmp_path / "model",
        lambda weights: {
            name: each[:40] if name in ("lm_head.weight", "model.embed_tokens.weight") else each
            for name, each in weights.items()
        },
        vocab_size=40,
    )
    with pytest.raises(InputError, match=r"vocab_size: above \d+ expected, .*, got 40$"):
        captured(open_model(str(model)), tmp_path)


def test_a_layer_without_finite_numbers_is_named(tiny_model: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, Any]) -> dict[str, Any]:
        weights["model.layers.1.self_attn.k_proj.weight"][16:] = float("nan")
        return weights

    model = changed_model(tiny_model, tmp_path / "model", spoil)
    with pytest.raises(InputError, match=r"layer 1, head 1: key is not finite"):
        captured(open_model(str(model)), tmp_path)


def test_what_only_running_shows_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """Factors for long contexts alone that are of another width than the heads."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0] * 3,
        "original_max_position_embeddings": 32,
    }
    model = changed_model(tiny_model, tmp_path / "model", rope_parameters=rope)
    with pytest.raises(InputError, match=r"cannot run what config\.json describes: ") as refused:
        captured(open_model(str(model)), tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("reach", [1024, 2048])
def test_few_positions_are_tuned_by_default(reach: int, tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model", max_position_embeddings=reach)
    output = tmp_path / "p.json"
    arguments = [*where(model, output), "--layers", "0"]
    assert tune.main([*arguments, "--tolerance", "0.3"]) == 0
    profile = load_profile(output)
    assert (profile.min_seq_len, profile.max_seq_len) == (reach // 4, reach)


@pytest.mark.parametrize(
    "fields",
    [
        {**MISTRAL, "sliding_window": 1024},
        {**MISTRAL, "sliding_window": 262_144},
        {**MISTRAL, "sliding_window": 0},
        {**QWEN2, "use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 1},
    ],
    ids=str,
)
def test_a_window_that_hides_nothing_is_none(
    fields: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    model = open_model(str(changed_model(tiny_model, tmp_path / "model", **fields)))
    assert model.config.sliding_window is None
    if fields["model_type"] == "mistral":  # the weights are as Mistral's
        captured(model, tmp_path)


def test_a_window_shorter_than_the_positions_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model", **MISTRAL, sliding_window=1023)
    with pytest.raises(InputError, match=r"sliding_window: null expected, or at least .*\(1024\)"):
        open_model(str(model))
    # The window is that of more positions then.
    longer = {"max_position_embeddings": 1023}
    assert open_model(str(model), overrides=longer).config.sliding_window is None


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_server_takes_a_window_beyond_the_profile_for_none(platform: str) -> None:
    profile = uniform_profile()
    for window, expected in ((8192, None), (262_144, None), (8191, "local_attention")):
        impl = make_impl(platform, sliding_window=window)
        assert impl.unsupported_feature(128, profile) == expected
        assert impl.unsupported_feature(128, None) == "local_attention"


def fingerprint(**fields: Any) -> ModelFingerprint:
    return SMALL_MODEL.model_copy(update=fields)


@pytest.mark.parametrize(
    ("mine", "theirs", "key"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 10000, "rope_type": "default"}, None),
        ({"type": "yarn", "factor": 4}, {"rope_type": "yarn", "factor": 4.0}, None),
        (
            {"type": "yarn", "rope_type": "yarn", "factor": 4},
            {"rope_type": "yarn", "factor": 4.0},
            None,
        ),
        (
            {"type": "su", "long_factor": (1, 2)},
            {"rope_type": "longrope", "long_factor": [1, 2]},
            None,
        ),
        ({"partial_rotary_factor": 1.0}, {}, None),
        ({"type": "mrope", "mrope_section": [1]}, {"mrope_section": [1]}, None),
        ({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 2.0}, "factor"),
        ({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}, "rope_type"),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, {}, "partial_rotary_factor"),
        (
            {"full_attention": {"factor": 1.0}, "sliding_attention": {"rope_theta": 1e4}},
            {"full_attention": {"factor": 2.0}, "sliding_attention": {"rope_theta": 1e4}},
            "factor",
        ),
        (  # as in profiles of version 2
            {"full_attention": {"factor": 1.0}, "sliding_attention": {"rope_theta": 1e4}},
            {"factor": 1.0},
            None,
        ),
    ],
    ids=str,
)
def test_rotary_embeddings_are_compared_by_what_they_mean(
    mine: dict[str, Any], theirs: dict[str, Any], key: str | None
) -> None:
    profile = uniform_profile(fingerprint(rope=mine))
    if key is None:
        profile.check_model(fingerprint(rope=theirs), "p.json")
        return
    with pytest.raises(ProfileError) as refused:
        profile.check_model(fingerprint(rope=theirs), "p.json")
    assert str(refused.value).count(f"model.rope.{key} is ") == 1
    assert len(str(refused.value)) < 150


def test_the_same_layers_under_another_name_are_the_same() -> None:
    for name in ("MistralForCausalLM", "LlamaForSequenceClassification"):
        assert uniform_profile().model.difference(fingerprint(architecture=name)) is None
    assert "num_heads" in str(SMALL_MODEL.difference(fingerprint(num_heads=8)))


@pytest.mark.parametrize(
    ("overrides", "reach", "rope"),
    [
        ({"max_position_embeddings": 4096}, 4096, {"rope_theta": 1e4, "rope_type": "default"}),
        (
            {"max_position_embeddings": 4096, "rope_parameters": {**YARN, "rope_theta": 1e4}},
            4096,
            {**YARN, "rope_theta": 1e4},
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            2048,
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
    ],
    ids=str,
)
def test_overrides_are_those_of_the_server(
    overrides: dict[str, Any], reach: int, rope: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Against the configuration that vLLM itself makes of them."""
    from vllm.config import ModelConfig

    text = json.dumps(overrides)
    options = tuning_parser("tune").parse_args(
        ["--model", "m", "--output", "p", "--hf-overrides", text]
    )
    model = open_model(str(tiny_model), overrides=options.hf_overrides)
    assert model.max_length == reach
    expected = fingerprint(**model.fingerprint.model_dump(exclude={"rope"}), rope=rope)
    assert model.fingerprint.difference(expected) is None
    served = ModelConfig(str(tiny_model), hf_overrides=json.loads(text))
    assert served.max_model_len == reach
    assert model.fingerprint.difference(ModelFingerprint.from_config(served.hf_config)) is None
    captured(model, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"max_position_embeddings": "4096"}, "max_position_embeddings: a whole number"),
        ({"rope_parameters": YARN}, "rope_parameters: rope_theta expected"),
        ({"rope_scaling": "yarn"}, "rope_scaling: an object expected"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_a_wrong_override_is_named(overrides: dict[str, Any], named: str, tiny_model: Path) -> None:
    with pytest.raises(InputError) as refused:
        open_model(str(tiny_model), overrides=overrides)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[]", "1", "yarn"])
def test_overrides_that_are_no_object_are_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--model", "m", "--output", "p", "--hf-overrides", text])
    assert "argument --hf-overrides: a JSON object expected" in capsys.readouterr().err


def test_overrides_and_revision_reach_the_profile(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.json"
    rope = {**YARN, "rope_theta": 1e4}
    text = json.dumps({"max_position_embeddings": 4096, "rope_parameters": rope})
    more = ["--hf-overrides", text, "--layers", "0", "--tolerance", "0.3"]
    assert tune.main(command(tiny_model, output, *more)) == 0
    assert load_profile(output).model.rope == rope


FIELDS = [
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
    "intermediate_size", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "layer_types", "sliding_window", "architectures", "model_type",
    "quantization_config", "text_config", "torch_dtype", "dtype", "hidden_act", "attention_bias",
    "tie_word_embeddings", "is_encoder_decoder", "pad_token_id", "bos_token_id", "id2label",
    "auto_map", "transformers_weights", "dual_chunk_attention_config", "kv_lora_rank", "alibi",
    "attn_logit_softcapping", "use_sliding_window", "max_window_layers", "partial_rotary_factor",
    "per_layer_config", "num_labels", "problem_type", "attn_implementation", "name_or_path",
    "initializer_range", "pretraining_tp", "mlp_bias", "compression_config", "quantization",
]  # fmt: skip
KINDS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "mixtral",
    "gpt_neox",
    "bert",
    "t5",
]
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(
            ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "mrope", "x", 3]
        ),
        "type": st.sampled_from(["default", "yarn", "su", None, 1]),
        "factor": st.sampled_from([0, 1, 4.0, -2.0, "4", None, float("inf"), 1e300]),
        "rope_theta": st.sampled_from([1e4, 0, -1.0, "1e4", None]),
        "original_max_position_embeddings": st.sampled_from([1024, 0, "1024", None]),
        "short_factor": st.sampled_from([[1.0] * 8, [], "x"]),
        "long_factor": st.sampled_from([[1.0] * 8, [2.0], None]),
        "full_attention": st.dictionaries(st.sampled_from(["factor", "rope_type"]), st.integers()),
    },
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers() | st.floats()
    | st.text(max_size=8) | st.sampled_from(["4", "1e-6", "full_attention", *KINDS]) | ROPE
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)
SMALL_LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-10, 10) | ROPE
    | st.sampled_from(["4", "silu", "relu2", "float16", "full_attention", *KINDS])
)  # fmt: skip
CHANGES = st.dictionaries(
    st.sampled_from(FIELDS) | st.text(max_size=8), VALUES | ROPE, min_size=1, max_size=3
)
CONFIGURATIONS = st.tuples(
    st.sampled_from(KINDS), CHANGES, st.lists(st.sampled_from(FIELDS[:12]), max_size=1)
)


NUM_FUZZED = int(os.environ.get("AFBS_FUZZED_CONFIGURATIONS", "2000"))


@settings(max_examples=NUM_FUZZED, deadline=None, suppress_health_check=list(HealthCheck))
@given(CONFIGURATIONS, st.booleans())
def test_a_fuzzed_configuration_is_opened_or_refused_in_one_line(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    drawn: tuple[str, dict[str, Any], list[str]],
    as_overrides: bool,
) -> None:
    kind, changes, removed = drawn
    folder = tmp_path_factory.mktemp("fuzzed")
    names = {
        "bert": "BertForMaskedLM",
        "t5": "T5ForConditionalGeneration",
        "gpt_neox": "GPTNeoXForCausalLM",
    }
    architecture = names.get(kind, f"{kind.capitalize()}ForCausalLM")
    config = json.loads((tiny_model / "config.json").read_text())
    config |= {"model_type": kind, "architectures": [architecture]}
    if not as_overrides:
        config |= changes
    for name in removed:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = open_model(str(folder), overrides=changes if as_overrides else None)
    except InputError as error:
        check_line(error, folder)
        return
    event("opened")
    shape = model.fingerprint
    assert min(shape.num_layers, shape.num_kv_heads, shape.head_dim, model.max_length) >= 1
    assert shape.num_heads % shape.num_kv_heads == 0


def check_line(error: InputError, model: Path) -> None:
    line = str(error)
    assert line.startswith((f"{model}: ", f"out of memory while loading the weights of {model}: "))
    assert "\n" not in line
    assert len(line) < 1000


@settings(max_examples=NUM_FUZZED // 20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), SMALL_LEAVES, min_size=1, max_size=2))
def test_a_fuzzed_model_is_run_or_refused_in_one_line(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    model = changed_model(tiny_model, folder / "model", **changes)
    try:
        captured(open_model(str(model)), folder)
        event("run")
    except InputError as error:
        check_line(error, model)


def long_rope(tiny_model: Path, directory: Path, original: int) -> Path:
    config = json.loads((tiny_model / "config.json").read_text())
    halves = (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": original,
        "short_factor": [1.0] * halves,
        "long_factor": [4.0] * halves,
        "factor": config["max_position_embeddings"] / original,
    }
    return changed_model(tiny_model, directory, rope_parameters=rope)


@pytest.mark.parametrize(("longest", "status"), [(128, 2), (256, 0)])
def test_long_rope_is_tuned_with_the_factors_that_are_served(
    longest: int,
    status: int,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server that admits long prompts takes the long factors for every prompt."""
    model = long_rope(tiny_model, tmp_path / "model", original=128)
    lengths = ["--lengths", str(longest // 2), str(longest), "--tolerance", "0.2"]
    arguments = command(model, tmp_path / "p.json", *lengths)
    assert tune.main(arguments) == status
    if status:
        assert "--lengths: a longest length of 129 or more expected" in capsys.readouterr().err
