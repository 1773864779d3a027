"""``python -m vllm_afbs.check`` on models that vLLM cannot make: here, or with our backend."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.transformers_utils.config import get_config

from tests.profiles import uniform_profile
from tests.test_check import OURS, llama_config, outcome
from vllm_afbs.check import layers
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import LayerProfile


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets two variables; both are put back after each test."""
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_AFBS_PROFILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_layers_without_full_attention_count_as_others_without_the_models_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Any) -> None:
        raise NotImplementedError("only on CUDA")

    monkeypatch.setattr(layers, "make_layers", fail)
    config = llama_config()
    config.save_pretrained(tmp_path)
    profile = uniform_profile(ModelFingerprint.from_config(config))
    chosen = [*profile.layers[:3], LayerProfile(levels=[])]
    hybrid = profile.model_copy(update={"layers": chosen})
    write_atomically(tmp_path / "profile.json", hybrid.to_json())
    given = ("--model", tmp_path, "--profile", tmp_path / "profile.json", OURS)
    status, lines, _ = outcome(capsys, *given)
    assert status == 0
    assert lines[-1] == (
        "on: 3 of 3 layers sparse from 1,024 to 4,096 tokens; 1 other has no full attention"
    )


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "own"),
    [
        ("deepseek_v3", "DeepseekV3ForCausalLM", {}, "dense latent attention (MLA)"),
        (
            "deepseek_v32", "DeepseekV32ForCausalLM",
            {"index_topk": 2048, "index_n_heads": 4, "index_head_dim": 128},
            "latent attention (MLA) with sparse attention trained into the model (index_topk)",
        ),
    ],
)  # fmt: skip
def test_latent_attention_is_refused_as_a_server_refuses_it(
    model_type: str, architecture: str, fields: dict[str, int], own: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sizes = {
        "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "q_lora_rank": 64, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_routed_experts": 2, "num_experts_per_tok": 1, "vocab_size": 256,
    }  # fmt: skip
    config = {"model_type": model_type, "architectures": [architecture], **sizes, **fields}
    write_atomically(tmp_path / "config.json", json.dumps(config))
    fingerprint = ModelFingerprint.from_config(get_config(tmp_path, trust_remote_code=False))
    write_atomically(tmp_path / "profile.json", uniform_profile(fingerprint).to_json())
    given = (
        "--model",
        tmp_path,
        "--profile",
        tmp_path / "profile.json",
        OURS,
        "--dtype",
        "bfloat16",
    )
    status, lines, error = outcome(capsys, *given)
    assert status == 2
    (line,) = error.splitlines()
    assert line.startswith(f"vllm-afbs-check: error: {tmp_path} has {own}, and --attention-backend")
    assert not any(line.endswith("sparse") for line in lines)
