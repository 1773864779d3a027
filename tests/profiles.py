"""Profiles for tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import profiles
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import HeadProfile, LayerLevel, LayerProfile, Profile

SMALL_MODEL = ModelFingerprint(
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rope={"rope_theta": 10000.0, "rope_type": "default"},
)


def uniform_profile(
    model: ModelFingerprint = SMALL_MODEL, tau: float = 0.9, sparsity: float = 0.5, **fields: Any
) -> Profile:
    """One setting for every head of a small model, for contexts from 1024 to 8192."""
    values = {"min_seq_len": 1024} | fields
    return profiles.uniform_profile(model, tau, sparsity, [8192], **values)


def one_level(heads: Sequence[HeadProfile], tolerance: float | None = None) -> LayerProfile:
    """A layer of a profile with a single level."""
    return LayerProfile(levels=[LayerLevel(heads=list(heads), tolerance=tolerance)])


def of_levels(by_name: Mapping[str, Profile], default: str) -> Profile:
    """One profile whose levels are those of profiles with a single level."""
    profiles = list(by_name.values())
    layers = [
        LayerProfile(levels=[level for layer in same_layer for level in layer.levels])
        for same_layer in zip(*(profile.layers for profile in profiles), strict=True)
    ]
    levels = [
        profile.levels[0].model_copy(update={"name": name}) for name, profile in by_name.items()
    ]
    update = {"levels": levels, "default_level": default, "layers": layers}
    return profiles[0].model_copy(update=update)
