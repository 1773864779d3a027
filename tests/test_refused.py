"""What stops a server before anything is loaded, and what it only says."""

import copy
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from transformers import AutoConfig, DeepseekV3Config, LlamaConfig
from vllm.config import ModelConfig, VllmConfig

from tests.profiles import uniform_profile
from vllm_afbs import compat
from vllm_afbs.backends.cpu.platform import AfbsCpuPlatform
from vllm_afbs.backends.cuda.backend import AfbsCUDABackend
from vllm_afbs.demo.server import HOST, SERVER_ENVIRONMENT, free_port, vllm_command
from vllm_afbs.files import write_atomically
from vllm_afbs.observability import instance, membership
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.weights import weights_sha256
from vllm_afbs.serving import admission, configuration


def llama(**changes: Any) -> Any:
    """The configuration that ``SMALL_MODEL`` is the fingerprint of."""
    shape = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 128, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    return LlamaConfig(**shape | changes)


def server_config(tmp_path: Path, hf_config: Any, **changes: Any) -> Any:
    path = tmp_path / "profile.json"
    write_atomically(path, uniform_profile().to_json())
    values = {
        "additional_config": {"afbs": {"profile": str(path)}},
        "model_config": SimpleNamespace(hf_config=hf_config, quantization=None),
        "kv_transfer_config": None,
        "observability_config": SimpleNamespace(),
        "cache_config": SimpleNamespace(block_size=16, user_specified_block_size=False),
        "device_config": SimpleNamespace(device_type="cpu"),
    }
    return SimpleNamespace(**values | changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_hidden_layers": 3}, "num_layers"),
        ({"num_attention_heads": 8}, "num_heads"),
        ({"num_key_value_heads": 1}, "num_kv_heads"),
        ({"head_dim": 64}, "head_dim"),
        ({"rope_theta": 5e5}, "rope.rope_theta"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope.rope_type",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            "rope.rope_type",
        ),
    ],
    ids=str,
)
def test_another_model_is_refused(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    hf_config = llama(**changes)
    with pytest.raises(ProfileError, match=rf"model\.{field} is ") as refused:
        admission.admit(server_config(tmp_path, hf_config))
    assert "\n" not in str(refused.value)


def test_a_level_that_the_profile_does_not_have_is_refused(tmp_path: Path) -> None:
    config = server_config(tmp_path, llama())
    config.additional_config["afbs"] = {**config.additional_config.get("afbs", {}), "level": "fast"}
    before = dict(config.additional_config)
    message = r"^--additional-config: afbs\.level: one of tuned expected, got 'fast'$"
    with pytest.raises(ProfileError, match=message):
        admission.admit(config)
    assert config.additional_config == before
    config.additional_config["afbs"] |= {"level": "tuned"}
    admission.admit(config)
    assert config.additional_config["afbs"]["level"] == "tuned"


def test_a_draft_of_a_checked_configuration_is_not_checked_again(tmp_path: Path) -> None:
    config = server_config(tmp_path, llama())
    admission.admit(config)
    admitted = config.additional_config
    config.model_config = SimpleNamespace(hf_config=llama(num_hidden_layers=1), quantization=None)
    admission.admit(config)
    assert config.additional_config == admitted


def test_other_weights_and_outer_caches_are_said_once(tmp_path: Path, logged: list[str]) -> None:
    config = server_config(tmp_path, llama())
    config.model_config.quantization = "fp8"
    config.kv_transfer_config = SimpleNamespace(kv_connector="LMCacheConnectorV1")
    for _ in range(2):
        admission.admit(config)
    quantised, connector = logged
    assert "quantised (fp8)" in quantised
    assert f"cache_salt={uniform_profile().profile_id!r}" in connector
    assert "\n" not in quantised + connector


def checkpoint(directory: Path, fill: int) -> str:
    """A checkpoint whose weight file holds these bytes."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes([fill]) * 200_000)
    return str(directory)


@pytest.mark.parametrize(
    ("served", "load_format", "expected"),
    [
        ("tuned", "auto", "same"),
        ("other", "auto", "other"),
        ("other", "safetensors", "other"),
        ("other", "dummy", "unknown"),
        ("not-there", "auto", "unknown"),
    ],
)
def test_other_weights_than_the_tuned_ones_are_said(
    served: str, load_format: str, expected: str, tmp_path: Path, logged: list[str]
) -> None:
    tuned = Path(checkpoint(tmp_path / "tuned", 1))
    checkpoint(tmp_path / "other", 2)
    profile = uniform_profile().model_copy(update={"model_weights_sha256": weights_sha256(tuned)})
    config = server_config(tmp_path, llama(), load_config=SimpleNamespace(load_format=load_format))
    write_atomically(tmp_path / "profile.json", profile.to_json())
    config.model_config.model = str(tmp_path / served)
    config.model_config.revision = None
    admission.admit(config)
    assert admission.known_weights(config) == expected
    assert len(logged) == (expected == "other")
    assert all("weight files are not those" in line for line in logged)


def test_a_profile_that_knows_no_weights_says_unknown(tmp_path: Path, logged: list[str]) -> None:
    config = server_config(tmp_path, llama())
    admission.admit(config)
    assert admission.known_weights(config) == "unknown"
    assert not logged


def test_latent_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = SimpleNamespace(name="AFBS")
    for attribute in ("use_mla", "use_sparse"):
        asked = {"use_mla": False, "use_sparse": False, attribute: True}
        with pytest.raises(NotImplementedError, match=r"^--attention-backend afbs does not"):
            AfbsCpuPlatform.get_attn_backend_cls(ours, SimpleNamespace(**asked))
    # On CUDA, vLLM asks the backend itself and refuses it by name.
    assert not AfbsCUDABackend.is_mla()
    assert not AfbsCUDABackend.is_sparse()


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({}, "has dense latent attention (MLA), "),
        ({"index_topk": 64}, "(MLA) with sparse attention trained into the model (index_topk), "),
    ],
)
def test_latent_attention_is_refused_before_anything_is_loaded(
    fields: dict[str, Any], has: str, tmp_path: Path
) -> None:
    """The line says what the model has instead, which vLLM runs."""
    shape = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 4,
        "architectures": ["DeepseekV3ForCausalLM"],
    }  # fmt: skip
    DeepseekV3Config(**shape, **fields).save_pretrained(tmp_path)
    model = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16")
    assert model.use_mla
    ours, stock = SimpleNamespace(name="AFBS"), SimpleNamespace(name="CPU_MLA")

    def chosen(backend: Any, **by_kind: Any) -> Any:
        attention = SimpleNamespace(backend=backend, backend_per_kind=by_kind)
        return server_config(tmp_path, None, model_config=model, attention_config=attention)

    with pytest.raises(SystemExit) as refused:
        admission.admit_or_exit(chosen(ours))
    line = str(refused.value)
    assert line.startswith(f"vllm-afbs: {tmp_path} has ")
    assert has in line
    assert "start it without" in line
    assert "\n" not in line
    # What latent layers get is what counts.
    others = chosen(ours, mla_attention=stock, sliding_window_mla=stock)
    assert configuration.refused_latent_attention(others) is None
    assert configuration.refused_latent_attention(chosen(stock, full_attention=ours)) is None
    assert configuration.refused_latent_attention(chosen(stock, mla_attention=ours)) is not None


@pytest.mark.parametrize("installed", ["0.33.1", "0.25.0", "1.0.0rc1", "0.34.0+cu130"])
def test_an_unknown_version_is_one_line(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.unknown_version() is None
    monkeypatch.setattr(vllm, "__version__", installed)
    notice = compat.unknown_version()
    assert notice is not None
    assert notice.startswith(f"vllm-afbs does not know vLLM {installed}, only 0.26.0, 0.32.0,")
    assert "\n" not in notice


def test_the_compilation_cache_tells_profiles_apart() -> None:
    hashes = {
        VllmConfig(additional_config={"afbs": {"profile_id": name}}).compute_hash()
        for name in ("0123456789ab", "ba9876543210")
    }
    assert len(hashes) == 2


def test_vllm_copies_a_configuration_with_what_was_handed_over(tmp_path: Path) -> None:
    """As it does for the text model of a vision wrapper, in a worker."""
    llama().save_pretrained(tmp_path)
    model = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16")
    config = VllmConfig(model_config=model)
    before = config.compute_hash()
    membership.begin_server(config)
    configuration.hand_over(config, weights="same")
    server = configuration.handed_over(config)["server_id"]
    sent: VllmConfig = copy.deepcopy(config)
    copied = sent.with_hf_config(llama())
    assert configuration.handed_over(copied) == configuration.handed_over(config)
    assert config.compute_hash() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instance, "current", lambda: pytest.fail("a second server begins"))
        membership.begin_server(copied)
    assert configuration.handed_over(copied)["server_id"] == server


def _corrupt(text: str) -> str:
    return text[: len(text) // 2]


def _other_model(text: str) -> str:
    return text.replace('"head_dim": 64', '"head_dim": 96')


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [(_corrupt, "not valid JSON"), (_other_model, "model.head_dim is 96 in the profile and 64")],
)
def test_a_bad_profile_stops_the_server_with_one_line(
    spoil: Callable[[str], str], complaint: str, smollm2_dir: Path, tmp_path: Path
) -> None:
    """A real server, which ends before it starts an engine."""
    model = ModelFingerprint.from_config(AutoConfig.from_pretrained(smollm2_dir))
    path = tmp_path / "profile.json"
    path.write_text(spoil(uniform_profile(model).to_json()))
    done = subprocess.run(
        [
            *vllm_command(), "serve", str(smollm2_dir),
            "--attention-backend", "afbs",
            "--dtype", "float32",
            "--host", HOST,
            "--port", str(free_port()),
        ],
        env={**os.environ, **SERVER_ENVIRONMENT, "VLLM_AFBS_PROFILE": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"vllm-afbs: {path}: ")
    assert complaint in last_line
    assert "Traceback" not in done.stderr
