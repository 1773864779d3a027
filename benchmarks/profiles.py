"""Made-up profiles, with the same thresholds for every head."""

from collections.abc import Sequence
from typing import Any

from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import (
    HeadProfile,
    LayerLevel,
    LayerProfile,
    Level,
    Measurement,
    Profile,
)
from vllm_afbs.profile.tuner_run import TunerRun


def uniform_profile(
    model: ModelFingerprint,
    tau: float,
    sparsity: float,
    lengths: Sequence[int],
    theta: float = -1.0,
    **fields: Any,
) -> Profile:
    """Makes a profile with the same thresholds for every head.

    Args:
        model: The model that the profile is for.
        tau: Tau of every head.
        sparsity: Sparsity that the profile claims at every length; the dispatcher reads it.
        lengths: Calibration lengths that the profile claims, in ascending order.
        theta: Theta of every head.
        fields: Fields of the profile to set to other values.
    """
    calibration = [Measurement(length=each, error=0.05, sparsity=sparsity) for each in lengths]
    head = HeadProfile(tau=tau, theta=theta, calibration=calibration)
    run = TunerRun(
        version="made up",
        created_at="1970-01-01T00:00:00Z",
        seed=0,
        tolerance=0.05,
        lengths=list(lengths),
        evaluations=0,
        cost=0.0,
        wall_seconds=0.0,
    )
    layer = LayerLevel(heads=[head] * model.num_heads)
    level = Level.of_run(run, [layer])
    values: dict[str, Any] = {
        "model_name": "made up",
        "model": model,
        "block_q": 128,
        "block_k": 128,
        "min_seq_len": lengths[0],
        "max_seq_len": lengths[-1],
        "levels": [level],
        "default_level": level.name,
        "layers": [LayerProfile(levels=[layer])] * model.num_layers,
        "tuner": run,
    }
    return Profile(**(values | fields))
