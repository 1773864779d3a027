"""What the user configures: ``--additional-config`` and the environment."""

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_afbs.profile.errors import ProfileError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PROFILE_VARIABLE = "VLLM_AFBS_PROFILE"
_NOT_FOR_USERS = ("profile_id", "block_k")


class Settings(BaseModel):
    """``--additional-config '{"afbs": {...}}'``.

    Attributes:
        profile: Path of the profile to serve.
        profile_id: Identity of the profile that was checked at start-up. Not for users.
        block_k: Keys of the key blocks that the driver of an engine will serve. Not for users.
        per_head_metrics: Whether block products are also counted for each head.
        sample_rate: Share of a layer's sparse steps that are also computed dense and compared.
        lora: What runs sparse on a server with LoRA: ``base``, steps in which no adapter is
            active; ``validated``, also those with adapters that the profile was validated with.
            None: nothing.
        level: Name of the profile's level to serve at start. None: the profile's default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    profile: str | None = None
    profile_id: str | None = None
    block_k: int | None = None
    per_head_metrics: bool = False
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    lora: Literal["base", "validated"] | None = None
    level: str | None = None


def read_settings(vllm_config: "VllmConfig") -> Settings:
    """Reads our settings from ``additional_config``.

    Raises:
        ProfileError: The settings are malformed; the message names the field.
    """
    try:
        return Settings.model_validate(additional_config(vllm_config).get("afbs", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(["afbs", *map(str, first["loc"])])
        message = first["msg"]
        if first["type"] in ("extra_forbidden", "model_type"):
            names = [name for name in Settings.model_fields if name not in _NOT_FOR_USERS]
            message = f"an object with any of {', '.join(names)} expected"
        raise ProfileError(f"--additional-config: {field}: {message}") from None


def configured_profile(vllm_config: "VllmConfig") -> str | None:
    """Path of the profile to serve: ``additional_config`` first, then the environment.

    Raises:
        ProfileError: ``additional_config["afbs"]`` is malformed.
    """
    return read_settings(vllm_config).profile or os.environ.get(PROFILE_VARIABLE) or None


def additional_config(vllm_config: "VllmConfig") -> dict[str, Any]:
    """VLLM's ``additional_config``; empty if another platform's plugin put its own object there."""
    config = vllm_config.additional_config
    return config if isinstance(config, dict) else {}
