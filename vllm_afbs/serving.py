"""From vLLM's configuration to the thresholds that each attention layer serves."""

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile import (
    LayerProfile,
    ModelFingerprint,
    Profile,
    ProfileError,
    load_profile,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.afbs")

PROFILE_VARIABLE = "VLLM_AFBS_PROFILE"

MIN_LAYER_SPARSITY = 0.1
"""A layer tuned to less than this is left to the dense parent: selection would not pay."""


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does with long prefills.

    Attributes:
        layer: Index of the decoder layer.
        thresholds: Of this rank's query heads; None if the layer is dense.
        dense_reason: Why it is dense; None if it is sparse.
    """

    layer: int
    thresholds: HeadThresholds | None
    dense_reason: str | None


def configured_profile(vllm_config: "VllmConfig") -> str | None:
    """Path of the profile to serve: ``additional_config`` first, then the environment.

    Raises:
        ProfileError: ``additional_config["afbs"]`` is not of the form {"profile": path}.
    """
    settings = _additional(vllm_config).get("afbs", {})
    if (
        not isinstance(settings, dict)
        or not isinstance(settings.get("profile", ""), str)
        or (settings.keys() - {"profile", "profile_id"})
    ):
        raise ProfileError(
            f'--additional-config: afbs: {{"profile": "PATH"}} expected, got {settings!r}'
        )
    return settings.get("profile") or os.environ.get(PROFILE_VARIABLE) or None


def _additional(vllm_config: "VllmConfig") -> dict[str, Any]:
    # Other platforms' plugins put objects of their own there; ours is always a dict.
    config = vllm_config.additional_config
    return config if isinstance(config, dict) else {}


def admit(vllm_config: "VllmConfig") -> None:
    """Checks the configured profile against the model before anything is loaded.

    The profile's path and identity are noted in ``additional_config``: workers then serve the
    file that was checked, and vLLM's compilation cache tells profiles apart.

    Raises:
        ProfileError: The profile cannot be served with this model.
    """
    path = configured_profile(vllm_config)
    if path is None:
        logger.warning(
            "No profile given (%s is not set): every layer runs dense.", PROFILE_VARIABLE
        )
        return
    path = str(Path(path).absolute())
    profile = load_profile(path)
    profile.check_model(ModelFingerprint.from_config(vllm_config.model_config.hf_config), path)
    vllm_config.additional_config = {
        **_additional(vllm_config),
        "afbs": {"profile": path, "profile_id": profile.profile_id},
    }


@functools.cache
def _admitted(path: str, profile_id: str) -> Profile:
    profile = load_profile(path)
    if profile.profile_id != profile_id:
        raise ProfileError(
            f"{path}: profile {profile_id} was checked at start-up, "
            f"the file now holds {profile.profile_id}"
        )
    return profile


def admitted_profile(vllm_config: "VllmConfig") -> Profile | None:
    """The profile that ``admit`` accepted, None if there is none.

    Raises:
        ProfileError: The file changed since.
    """
    settings = _additional(vllm_config).get("afbs")
    return _admitted(settings["profile"], settings["profile_id"]) if settings else None


def plan_layer(
    profile: Profile | None, layer: int, num_heads: int, rank: int, unsupported: str | None
) -> LayerPlan:
    """Decides what a layer serves.

    Args:
        profile: The admitted profile, if any.
        layer: Index of the decoder layer.
        num_heads: Query heads of this tensor-parallel rank.
        rank: The rank: it holds heads ``[rank * num_heads, (rank + 1) * num_heads)``.
        unsupported: Why this layer cannot run sparse whatever the profile says, or None.
    """
    if profile is None:
        return LayerPlan(layer, None, "no_profile")
    if unsupported is not None:
        return LayerPlan(layer, None, unsupported)
    tuned = profile.layers[layer]
    if _mean_sparsity(tuned) < MIN_LAYER_SPARSITY:
        return LayerPlan(layer, None, "profile_dense")
    heads = tuned.heads[rank * num_heads : (rank + 1) * num_heads]
    thresholds = HeadThresholds(
        torch.tensor([head.tau for head in heads]), torch.tensor([head.theta for head in heads])
    )
    return LayerPlan(layer, thresholds, None)


def _mean_sparsity(layer: LayerProfile) -> float:
    """Mean tuned sparsity over the heads at the longest length; a head of tau = 1 has none."""
    return sum(
        head.calibration[-1].sparsity if head.tau < 1 and head.calibration else 0.0
        for head in layer.heads
    ) / len(layer.heads)
