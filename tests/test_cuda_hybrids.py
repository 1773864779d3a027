"""Models with few full-attention layers in a real engine on a GPU, small and of random weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from benchmarks.engine import Job, run_job
from benchmarks.hybrid_models import FULL, MODELS, HybridModel
from benchmarks.profiles import uniform_profile
from tests.written_metrics import counters_in
from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.observability import instance
from vllm_afbs.profile.fingerprint import ModelFingerprint

PROMPT_LENS = (20000, 300)
CHUNKS = ((16384, 16384), (3616, 20000))
"""Query rows and context of the long prompt's prefills."""
NUM_PREFILLS = 2
"""Of the long prompt: one to warm up, and one measured."""
MAX_MODEL_LEN = 32768
SMALLER = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
DIVISORS = {"gemma-3-27b": 4, "gpt-oss-120b": 9, "qwen3.5-27b": 8}


def small(name: str) -> HybridModel:
    """A model with at least two full-attention layers, and others of every kind that it has."""
    model = MODELS[name].shallower(DIVISORS[name])
    smaller = dict(SMALLER)
    if "linear_num_key_heads" in model.config:
        smaller |= {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    if "num_local_experts" in model.config:
        smaller |= {"num_local_experts": 8}
    return replace(model, config=model.config | smaller)


@pytest.mark.gpu
@pytest.mark.parametrize("block_k", [128, 64])
@pytest.mark.parametrize("name", MODELS)
def test_full_layers_attend_as_flash_attention_does(
    name: str, block_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tiles, which need pages of the profile's key blocks, also out of blocks for Mamba."""
    # Read once the engine has gone.
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "metrics"))
    model = small(name)
    (tmp_path / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(tmp_path))
    # Calibrated as sparse, so that it runs sparse, but with a tau that keeps nearly every block.
    profile = tmp_path / "profile.json"
    lengths = [8192, MAX_MODEL_LEN]
    nearly_all = uniform_profile(fingerprint, 1 - 1e-6, 0.8, lengths, block_k=block_k)
    write_atomically(profile, nearly_all.to_json())
    prompts = [[(11 * i + i // 7 + n) % 1000 for i in range(n)] for n in PROMPT_LENS]
    job = Job(
        name, "AFBS", str(tmp_path), True, MAX_MODEL_LEN, prompts, 1, profile=str(profile),
        way="tiles", settings={"sample_rate": 1.0}, without_experts=model.without_experts,
    )  # fmt: skip
    products = run_job(job)["block_products"]

    cuts = [BlockGeometry(q_len, kv_len, 128, block_k) for q_len, kv_len in CHUNKS]
    visible = NUM_PREFILLS * sum(cut.num_visible for cut in cuts)
    total = products["computed"] + products["skipped"]
    assert total == 2 * model.num_full * SMALLER["num_attention_heads"] * visible
    assert products["computed"] > 0.99 * total
    counters = counters_in(tmp_path / "metrics")
    full = {str(layer) for layer, kind in enumerate(model.kinds) if kind == FULL}
    samples = counters.by("vllm_afbs_sampled_error_count", "layer")
    assert len(full) >= 2
    assert samples.keys() == full
    errors = counters.by("vllm_afbs_sampled_error_sum", "layer")
    # Nearly every block is kept, so what differs from vLLM's own dense attention is rounding.
    assert all(errors[layer] < 0.02 * samples[layer] for layer in full)
