"""From vLLM's configuration to the thresholds that each attention layer serves."""

import functools
import logging
import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_afbs import compat
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import Profile, mean_calibration
from vllm_afbs.serving import eligibility, reasons
from vllm_afbs.serving.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.afbs")

PROFILE_VARIABLE = "VLLM_AFBS_PROFILE"

UNKNOWN_LAYER = -1
"""Index of a layer that is no layer of the profile's model, a draft model's for instance."""


class Settings(BaseModel):
    """``--additional-config '{"afbs": {...}}'``.

    Attributes:
        profile: Path of the profile to serve.
        profile_id: Identity of the one that was checked at start-up; not for users.
        per_head_metrics: Whether block products are also counted by head.
        sample_rate: Share of a layer's sparse steps that is also computed dense and compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    profile: str | None = None
    profile_id: str | None = None
    per_head_metrics: bool = False
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does with long prefills.

    Attributes:
        layer: Index of the decoder layer.
        heads: This rank's query heads, by their index in the whole layer.
        thresholds: Of this rank's query heads; None if the layer is dense.
        dense_reason: Why it is dense; None if it is sparse.
        calibration: Mean sparsity of this rank's heads by calibrated length, shortest first.
    """

    layer: int
    heads: range
    thresholds: HeadThresholds | None
    dense_reason: Reason | None
    calibration: tuple[tuple[int, float], ...] = ()

    def expected_sparsity(self, kv_len: int) -> float:
        """Sparsity that calibration promises at a context length, between its lengths linear."""
        lengths = [length for length, _ in self.calibration]
        upper = min(bisect_left(lengths, kv_len), len(lengths) - 1)
        lower = max(upper - 1, 0)
        (start, low), (stop, high) = self.calibration[lower], self.calibration[upper]
        share = (kv_len - start) / (stop - start) if stop > start else 0.0
        return low + (high - low) * min(max(share, 0.0), 1.0)


def read_settings(vllm_config: "VllmConfig") -> Settings:
    """What ``additional_config`` says.

    Raises:
        ProfileError: It is not of the expected form; the message names the field.
    """
    try:
        return Settings.model_validate(_additional(vllm_config).get("afbs", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(["afbs", *map(str, first["loc"])])
        message = first["msg"]
        if first["type"] in ("extra_forbidden", "model_type"):
            names = [name for name in Settings.model_fields if name != "profile_id"]
            message = f"an object with any of {', '.join(names)} expected"
        raise ProfileError(f"--additional-config: {field}: {message}") from None


def configured_profile(vllm_config: "VllmConfig") -> str | None:
    """Path of the profile to serve: ``additional_config`` first, then the environment.

    Raises:
        ProfileError: ``additional_config["afbs"]`` is malformed.
    """
    return read_settings(vllm_config).profile or os.environ.get(PROFILE_VARIABLE) or None


def admit_or_exit(vllm_config: "VllmConfig") -> None:
    """Does what ``admit`` does where the afbs backend is chosen; platforms call it.

    Raises:
        SystemExit: With one line; an exception would be buried in vLLM's traceback.
    """
    if vllm_config.model_config is None or not compat.is_afbs(vllm_config.attention_config.backend):
        return
    if notice := compat.unknown_version():
        logger.warning("%s", notice)
    try:
        admit(vllm_config)
    except ProfileError as error:
        raise SystemExit(f"vllm-afbs: {error}") from None


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
    if read_settings(vllm_config).profile_id is not None:
        # vLLM makes copies of a checked configuration with another model in it: a draft's, or one
        # part of a multimodal one. Which layers are the profile's is decided layer by layer.
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
    checked = {"profile": path, "profile_id": profile.profile_id}
    settings = read_settings(vllm_config).model_copy(update=checked)
    vllm_config.additional_config = {
        **_additional(vllm_config),
        "afbs": settings.model_dump(exclude_defaults=True),
    }
    for notice in notices(vllm_config, profile.profile_id):
        logger.warning("%s", notice)


def notices(vllm_config: "VllmConfig", profile_id: str) -> list[str]:
    """What runs sparse but is not what the profile was tuned on, or may outlive it; a line each."""
    found = []
    if method := vllm_config.model_config.quantization:
        found.append(
            f"The model's weights are quantised ({method}); the profile does not say whether it "
            "was tuned on them. Serve with a sample_rate and compare the error."
        )
    if vllm_config.kv_transfer_config is not None:
        found.append(
            "A KV connector is configured. Its cache does not know profiles: give each one a "
            f"store or a prefix of its own, or let requests carry cache_salt={profile_id!r}."
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
    """The profile that ``admit`` accepted, None if there is none.

    Raises:
        ProfileError: The file changed since.
    """
    settings = read_settings(vllm_config)
    if settings.profile is None or settings.profile_id is None:
        return None
    return _admitted(settings.profile, settings.profile_id)


def plan_layer(
    profile: Profile | None, layer: int, num_heads: int, rank: int, unsupported: Reason | None
) -> LayerPlan:
    """Decides what a layer serves.

    Args:
        profile: The admitted profile, if any.
        layer: Index of the decoder layer.
        num_heads: Query heads of this tensor-parallel rank.
        rank: The rank: it holds heads ``[rank * num_heads, (rank + 1) * num_heads)``.
        unsupported: Why this layer cannot run sparse whatever the profile says, or None.
    """
    heads = range(rank * num_heads, (rank + 1) * num_heads)
    if profile is None:
        return LayerPlan(layer, heads, None, "no_profile")
    if unsupported is not None:
        return LayerPlan(layer, heads, None, unsupported)
    tuned = profile.layers[layer]
    if not tuned.is_sparse:
        return LayerPlan(layer, heads, None, "profile_dense")
    own = tuned.heads[heads.start : heads.stop]
    return LayerPlan(layer, heads, HeadThresholds.of(own), None, mean_calibration(own))


def plan_layers(
    vllm_config: "VllmConfig", layer_names: list[str], page_size: int
) -> Iterator[tuple[Any, LayerPlan]]:
    """Decides what each attention layer of these names serves.

    Args:
        vllm_config: With an admitted profile, or none.
        layer_names: The layers of one metadata builder.
        page_size: Keys of a page of their cache.

    Yields:
        The layer's implementation and its plan.
    """
    profile = admitted_profile(vllm_config)
    rank, num_ranks = compat.tensor_parallel_rank(), compat.tensor_parallel_size()
    layers = compat.attention_layers(vllm_config, layer_names)
    indices = compat.layer_indices(vllm_config)
    whole_server = eligibility.server_limits(vllm_config)
    plans = {}
    for name, layer in layers.items():
        unsupported: Reason | None = None
        if profile is not None:
            place = eligibility.place_limits(layer, indices.get(name), profile, num_ranks)
            unsupported = eligibility.first_true(whole_server | place)
            unsupported = unsupported or layer.impl.unsupported_feature(page_size, profile)
        index = indices.get(name, UNKNOWN_LAYER)
        plans[name] = plan_layer(profile, index, layer.impl.num_heads, rank, unsupported)
    reasons.log_layers((name, plan.dense_reason) for name, plan in plans.items())
    for name, layer in layers.items():
        yield layer.impl, plans[name]
