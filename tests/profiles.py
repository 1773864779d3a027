"""Profiles for tests."""

from typing import Any

from vllm_afbs.profile import (
    HeadProfile,
    LayerProfile,
    Measurement,
    ModelFingerprint,
    Profile,
    TunerRun,
)

SMALL_MODEL = ModelFingerprint(
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope={"rope_theta": 10000.0, "rope_type": "default"},
)


def uniform_profile(
    model: ModelFingerprint = SMALL_MODEL,
    tau: float = 0.9,
    theta: float = -1.0,
    sparsity: float = 0.5,
    **fields: Any,
) -> Profile:
    """One setting for every head, claimed to have been measured at this sparsity."""
    head = HeadProfile(
        tau=tau,
        theta=theta,
        calibration=[Measurement(length=8192, error=0.05, sparsity=sparsity)],
    )
    values: dict[str, Any] = {
        "model_name": "test",
        "model": model,
        "block_q": 128,
        "block_k": 128,
        "min_seq_len": 1024,
        "max_seq_len": 8192,
        "layers": [LayerProfile(heads=[head] * model.num_heads)] * model.num_layers,
        "tuner": TunerRun(
            version="test",
            created_at="2026-01-01T00:00:00Z",
            seed=0,
            tolerance=0.05,
            lengths=[8192],
            evaluations=0,
            cost=0.0,
            wall_seconds=0.0,
        ),
    }
    return Profile(**(values | fields))
