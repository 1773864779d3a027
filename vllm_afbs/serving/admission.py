"""Checks the configured profile before anything is loaded, and hands workers the checked one."""

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vllm_afbs import compat
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.weights import served_weights_sha256
from vllm_afbs.serving import configuration
from vllm_afbs.serving.settings import (
    PROFILE_VARIABLE,
    additional_config,
    configured_profile,
    read_settings,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.afbs")

Weights = Literal["same", "other", "unknown"]
"""How the model's weight files compare with those that the profile was tuned on."""


def admit_or_exit(vllm_config: "VllmConfig") -> bool:
    """Calls ``admit`` if our attention backend is chosen; both platforms call this.

    Returns:
        Whether it is chosen.

    Raises:
        SystemExit: The model or the profile was refused, for the reason in its one line. vLLM would
            bury any other exception in a traceback.
    """
    if vllm_config.model_config is None or not compat.chooses_afbs(vllm_config):
        return False
    if notice := compat.unknown_version():
        logger.warning("%s", notice)
    if reason := configuration.refused_latent_attention(vllm_config):
        raise SystemExit(f"vllm-afbs: {reason}")
    try:
        admit(vllm_config)
    except ProfileError as error:
        raise SystemExit(f"vllm-afbs: {error}") from None
    return True


def admit(vllm_config: "VllmConfig") -> None:
    """Checks the configured profile against the model before anything is loaded.

    The profile's path and identity are written into ``additional_config``. Workers therefore serve
    the file that was checked, and vLLM's compilation cache tells profiles apart.

    Raises:
        ProfileError: The profile cannot be served with this model.
    """
    settings = read_settings(vllm_config)
    if settings.profile_id is not None:
        # vLLM copies a checked configuration and replaces its model: by a draft model, or by one
        # part of a multimodal model. Each layer is matched with the profile later.
        return
    path = configured_profile(vllm_config)
    if path is None:
        logger.warning(
            "No profile given (%s is not set): every layer runs dense.", PROFILE_VARIABLE
        )
        return
    path = str(Path(path).absolute())
    profile = load_profile(path)
    profile.check_model(ModelFingerprint.from_config(vllm_config.model_config.hf_config), path)
    start_level(vllm_config, profile)
    checked = {"profile": path, "profile_id": profile.profile_id}
    vllm_config.additional_config = {
        **additional_config(vllm_config),
        "afbs": settings.model_copy(update=checked).model_dump(exclude_defaults=True),
    }
    weights = compare_weights(vllm_config, profile)
    configuration.hand_over(vllm_config, weights=weights)
    for notice in notices(vllm_config, profile, weights):
        logger.warning("%s", notice)


def compare_weights(vllm_config: "VllmConfig", profile: Profile) -> Weights:
    """Whether the model's weight files are those that the profile was tuned on.

    Pieces of the files are compared, and only files that are on this machine already.

    Args:
        vllm_config: The server's configuration.
        profile: The served profile.
    """
    if profile.model_weights_sha256 is None:
        return "unknown"
    source = configuration.weights_source(vllm_config)
    served = served_weights_sha256(*source) if source else None
    if served is None:
        return "unknown"
    return "same" if served == profile.model_weights_sha256 else "other"


def notices(vllm_config: "VllmConfig", profile: Profile, weights: Weights) -> list[str]:
    """Warnings, one line each, about what the profile was not tuned with.

    Args:
        vllm_config: The server's configuration.
        profile: The served profile.
        weights: What ``compare_weights`` found.
    """
    found: list[str] = []
    if weights == "other":
        found.append(
            "The model's weight files are not those that the profile was tuned on: a fine-tune, "
            "another revision, or the same weights stored differently. Serve with a sample_rate "
            "and compare the error, or tune on these weights."
        )
    method = vllm_config.model_config.quantization
    tuned_on = profile.tuned_on.quantization if profile.tuned_on else None
    if method and method != tuned_on:
        found.append(
            f"The model's weights are quantised ({method}); the profile was not tuned on weights "
            "that are, as far as it says. Serve with a sample_rate and compare the error."
        )
    if vllm_config.kv_transfer_config is not None:
        found.append(
            "A KV connector is configured, and its cache does not know profiles. Give each profile "
            "a store or a prefix of its own, or send requests with "
            f"cache_salt={profile.profile_id!r}."
        )
    return found


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
    """The profile that ``admit`` accepted; None if no profile was configured.

    Raises:
        ProfileError: The file changed since.
    """
    settings = read_settings(vllm_config)
    if settings.profile is None or settings.profile_id is None:
        return None
    return _admitted(settings.profile, settings.profile_id)


def expected_block_k(vllm_config: "VllmConfig | None") -> int | None:
    """Keys of the key blocks that will be served; None if that is not known.

    They are the admitted profile's, or those that the driver of an engine is going to serve.
    """
    if vllm_config is None:
        return None
    profile = admitted_profile(vllm_config)
    return read_settings(vllm_config).block_k if profile is None else profile.block_k


def start_level(vllm_config: "VllmConfig", profile: Profile | None) -> int:
    """Place of the level that is served at start, in the profile's levels; 0 without a profile.

    Raises:
        ProfileError: The configured level is none of the profile's; the message lists those.
    """
    if profile is None:
        return 0
    try:
        return profile.level_index(read_settings(vllm_config).level)
    except ProfileError as error:
        raise ProfileError(f"--additional-config: afbs.{error}") from None


def known_weights(vllm_config: "VllmConfig") -> str:
    """What ``admit`` found out about the model's weights."""
    return configuration.handed_over(vllm_config).get("weights", "unknown")
