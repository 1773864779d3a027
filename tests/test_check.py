"""``python -m vllm_afbs.check``: what is off is said in one line, and what is on is what is served.

``test_check_plugins.py`` has the environments in which a plugin does not load, and
``test_server_alone.py`` has a server that says the same. Models here have no weights.
"""

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig

from tests.profiles import of_levels, uniform_profile
from vllm_afbs.backends.cpu import backend
from vllm_afbs.backends.cpu.key_pages import UnknownPackingError
from vllm_afbs.check import __main__ as check
from vllm_afbs.check import layers
from vllm_afbs.commands import extras
from vllm_afbs.demo.server import SERVER_ENVIRONMENT
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.adapters import AdapterLevel, AdapterProfile
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import Profile

NUM_LAYERS = 4
OURS = "--attention-backend=afbs"


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=NUM_LAYERS, vocab_size=256,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def save_profile(model: Path, path: Path, dense: tuple[int, ...] = ()) -> Path:
    """A profile that leaves some layers dense."""
    profile = uniform_profile(ModelFingerprint.from_config(AutoConfig.from_pretrained(model)))
    flat = uniform_profile(profile.model, tau=1.0).layers
    chosen = [flat[i] if i in dense else layer for i, layer in enumerate(profile.layers)]
    write_atomically(path, profile.model_copy(update={"layers": chosen}).to_json())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    llama_config().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_profile(model, tmp_path_factory.mktemp("profile") / "profile.json", dense=(2,))


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets two variables; both are put back after each test."""
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_AFBS_PROFILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("VLLM_PLUGINS", "VLLM_TARGET_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in SERVER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    """Exit status, lines of standard output and standard error, from a run in this process."""
    status = check.main([str(each) for each in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err


def test_without_vllm_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    status, lines, error = outcome(capsys)
    assert (status, lines) == (2, [])
    (line,) = error.splitlines()
    assert "vllm is not installed: pip install 'vllm-afbs[vllm]'" in line


def test_an_unknown_version_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    status, lines, _ = outcome(capsys)
    assert status == 0
    notice = "note: vllm-afbs does not know vLLM 0.99.0"
    assert lines[1].startswith(notice)
    # Admission says it, too, once there is a model.
    _, lines, _ = outcome(capsys, "--model", model)
    assert sum(line.startswith(notice) for line in lines) == 1


def test_another_platforms_plugin_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise RuntimeError("Only one platform plugin can be activated")

    monkeypatch.setattr(check.compat, "active_platform", refuse)
    status, lines, _ = outcome(capsys)
    assert status == 1
    assert lines[-1] == (
        "off: platform plugin afbs: loads; RuntimeError: Only one platform plugin can be activated"
    )


def test_every_plugin_that_vllm_finds_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = outcome(capsys)
    for group in ("platform", "endpoint", "general"):
        for found in metadata.entry_points(group=f"vllm.{group}_plugins"):
            assert any(line.startswith(f"{group} plugin {found.name}: ") for line in lines)


def test_layers_are_answered_without_weights(
    model: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines, _ = outcome(capsys, "--model", model, "--profile", profile)
    assert status == 0
    assert "note: assumed --attention-backend afbs, which vllm serve has to be given" in lines
    assert "layers 0-1, 3: sparse" in lines
    assert "layers 2: dense, profile_dense" in lines
    assert "level tuned: the profile's only one" in lines
    line = "3 of 4 layers sparse from 1,024 to 4,096 tokens; 1 dense: profile_dense"
    assert lines[-1] == f"on: {line}"
    assert not list(model.glob("*.safetensors"))


def test_the_level_is_named_and_has_to_be_the_profiles(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model))
    by_name = {"exact": uniform_profile(fingerprint, tau=1.0), "fast": uniform_profile(fingerprint)}
    path = tmp_path / "profile.json"
    write_atomically(path, of_levels(by_name, default="exact").to_json())
    given = ["--model", model, "--profile", path, OURS, "--additional-config"]

    def at(name: str) -> tuple[int, list[str], str]:
        return outcome(capsys, *given, json.dumps({"afbs": {"level": name}}))

    status, lines, _ = at("fast")
    assert status == 0
    assert "level fast: the profile has exact, fast" in lines
    assert lines[-1] == "on: 4 of 4 layers sparse at level fast from 1,024 to 4,096 tokens"
    status, lines, _ = outcome(capsys, *given[:-1])
    assert status == 1
    assert "level exact: the profile has exact, fast" in lines
    assert lines[-1] == "off: 0 of 4 layers sparse; 4 dense: profile_dense"
    status, _, error = at("slow")
    assert status == 2
    expected = "--additional-config: afbs.level: one of exact, fast expected, got 'slow'"
    assert error.splitlines()[-1].endswith(expected)


OFF: list[tuple[list[str], str]] = [
    (["--kv-cache-dtype", "fp8"], "0 of 4 layers sparse; 4 dense: kv_cache_dtype"),
    (["--enable-lora"], "0 of 4 layers sparse; 4 dense: lora"),
    (["--max-model-len", "512"], "max_model_len is 512, the shortest calibrated context 1,024"),
    (["--max-num-batched-tokens", "64"], "chunks have at most 64 tokens"),
]


@pytest.mark.parametrize(("arguments", "reason"), OFF, ids=lambda value: str(value)[:40])
def test_arguments_that_turn_everything_off(
    arguments: list[str], reason: str, model: Path, profile: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--model", model, "--profile", profile, OURS, *arguments]
    status, lines, error = outcome(capsys, *given)
    assert status == 1, error
    assert lines[-1].startswith("off: 0 of 4 layers sparse; 4 dense: ")
    assert reason in lines[-1]
    assert not any(line.endswith(": sparse") for line in lines)


@pytest.mark.parametrize("setting", ["base", "validated"])
def test_lora_that_may_run_sparse_turns_nothing_off(
    setting: str, model: Path, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [
        AdapterProfile(
            name=name, sha256=digit * 64, levels=[AdapterLevel(kl=0.01, holds=name == "sql")]
        )
        for name, digit in (("sql", "a"), ("chat", "b"))
    ]
    own = tmp_path / "profile.json"
    listing = load_profile(profile).model_copy(update={"adapters": adapters})
    write_atomically(own, listing.to_json())
    given = ["--model", model, "--profile", own, OURS, "--enable-lora"]
    config = json.dumps({"afbs": {"lora": setting}})
    status, lines, error = outcome(capsys, *given, "--additional-config", config)
    assert status == 0, error
    assert lines[-1].startswith("on: 3 of 4 layers sparse from 1,024 to 4,096 tokens; 1 dense: ")
    note = "note: LoRA adapters that may run sparse: 'sql' (all levels), 'chat' (no level)"
    assert (note in lines) == (setting == "validated")


@pytest.mark.parametrize(
    ("block_k", "given"),
    [(128, ["--block-size", "96"]), (128, ["--block-size", "256"]), (64, []),
     (64, ["--block-size", "128"])],
)  # fmt: skip
def test_blocks_are_split_into_pages_that_key_blocks_consist_of(
    block_k: int,
    given: list[str],
    model: Path,
    profile: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = load_profile(profile).model_copy(update={"block_k": block_k})
    path = tmp_path / "profile.json"
    write_atomically(path, served.to_json())
    status, lines, _ = outcome(capsys, "--model", model, "--profile", path, OURS, *given)
    assert status == 0
    assert lines[-1].startswith("on: 3 of 4 layers sparse")


def test_what_the_builder_cannot_prepare_is_off(
    model: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise UnknownPackingError("keys are no permutation of a page")

    monkeypatch.setattr(backend, "SparsePrefill", fail)
    status, lines, _ = outcome(capsys, "--model", model, "--profile", profile)
    assert status == 1
    assert lines[-1] == "off: 0 of 4 layers sparse; 4 dense: 3 cache_layout, 1 profile_dense"


def test_without_a_profile_or_our_backend_nothing_is_on(
    model: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines, _ = outcome(capsys, model, OURS)
    assert (status, lines[-1]) == (1, "off: 0 of 4 layers sparse; 4 dense: no_profile")
    assert any(line.startswith("note: No profile given") for line in lines)
    for arguments in (["--dtype", "float32"], ["--attention-backend", "cpu_attn"]):
        status, lines, _ = outcome(capsys, "--model", model, "--profile", profile, *arguments)
        assert status == 1
        assert lines[-1].endswith("do not choose our backend: add --attention-backend afbs")


def test_a_model_of_two_kinds_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers with a sliding window have a metadata builder of their own."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=256, max_position_embeddings=4096,
        sliding_window=512, layer_types=kinds, architectures=["Gemma3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    profile = save_profile(tmp_path, tmp_path / "profile.json")
    status, lines, error = outcome(
        capsys, "--model", tmp_path, "--profile", profile, OURS, "--dtype", "bfloat16"
    )
    assert status == 0, error
    assert "layers 1, 3: sparse" in lines
    assert "layers 0, 2: dense, local_attention" in lines
    assert lines[-1] == (
        "on: 2 of 2 layers sparse from 1,024 to 4,096 tokens; 2 others have no full attention"
    )


def test_several_ranks_are_planned_as_one(
    model: Path, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", model, "--profile", profile, OURS, "--tensor-parallel-size", "2")
    status, lines, _ = outcome(capsys, *given)
    assert status == 0
    assert any(line.startswith("note: tensor_parallel_size=2: planned as one") for line in lines)
    assert lines[-1].startswith("on: 3 of 4 layers sparse")


def test_what_the_answer_leaves_out_is_noted() -> None:
    def notes(device: str, draft: object, **counts: int) -> list[str]:
        config: Any = SimpleNamespace(
            device_config=SimpleNamespace(device_type=device), speculative_config=draft
        )
        return layers.notes_on(config, counts)

    assert notes("cpu", None, tensor_parallel_size=1) == []
    (on_gpu,) = notes("cuda", None, tensor_parallel_size=1)
    assert "dense_is_faster" in on_gpu
    (drafter,) = notes("cpu", object(), tensor_parallel_size=1)
    assert "unknown_layer" in drafter
    (ranks,) = notes("cpu", None, tensor_parallel_size=1, pipeline_parallel_size=2)
    assert ranks.startswith("pipeline_parallel_size=2: planned as one rank")


def test_a_model_that_cannot_be_made_is_answered_from_its_configuration(
    model: Path, profile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Any) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor;\nno data!")

    monkeypatch.setattr(layers, "make_layers", fail)
    status, lines, _ = outcome(capsys, "--model", model, "--profile", profile)
    assert status == 0
    why = "without its weights (NotImplementedError: Cannot copy out of meta tensor; no data!)"
    assert any(why in line for line in lines if line.startswith("note: "))
    assert lines[-1].startswith("on: 3 of 4 layers sparse")
    given = ("--model", model, "--profile", profile, OURS, "--enable-lora")
    status, lines, _ = outcome(capsys, *given)
    assert (status, lines[-1]) == (1, "off: 0 of 4 layers sparse; 4 dense: lora")


def broken(profile: Path, directory: Path) -> Path:
    path = directory / "broken.json"
    path.write_text(profile.read_text(encoding="utf-8")[:100], encoding="utf-8")
    return path


def of_another_model(profile: Path, directory: Path) -> Path:
    served = Profile.model_validate_json(profile.read_text(encoding="utf-8")).model
    other = served.model_copy(update={"head_dim": 64})
    return Path(write(directory / "other.json", uniform_profile(other).to_json()))


def write(path: Path, text: str) -> str:
    write_atomically(path, text)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--frob", "3"], "vllm serve: unrecognized arguments: --frob 3"),
        (["--max-model-len", "many"], "--max-model-len"),
        (["--max-model-len", "999999"], "max_model_len (999999) is greater than"),
        (["--additional-config", '{"afbs": {"profil": "p"}}'], "afbs.profil: an object with"),
        (["--model", "/no/such/model"], "/no/such/model: no such directory"),
        (["--profile", "/no/such/profile"], "/no/such/profile: cannot read the profile"),
        (["--enable-sleep-mode"], "Sleep mode is not supported on current platform"),
        (["--profile", broken], "broken.json: not valid JSON"),
        (["--profile", of_another_model], "model.head_dim is 64 in the profile and 32"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(
    arguments: list[Any], complaint: str, model: Path, profile: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [each(profile, tmp_path) if callable(each) else each for each in arguments]
    # Of an option that is given twice, the later one counts.
    status, _, error = outcome(capsys, "--model", model, "--profile", profile, OURS, *given)
    assert status == 2
    (line,) = [each for each in error.splitlines() if "error" in each]
    assert line.startswith("vllm-afbs-check: error: ")
    assert complaint in line
    assert "Traceback" not in error


def test_a_fault_of_ours_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(layers, "plan_server", SimpleNamespace())  # cannot be called
    status, _, error = outcome(capsys, "--model", model)
    assert status == 70
    line = error.splitlines()[-1]
    assert "a fault of vllm-afbs" in line
    (kept,) = tmp_path.glob("vllm-afbs-fault-*.txt")
    assert str(kept) in line
