"""What the tuner found out about LoRA adapters: the levels at which each of them may run sparse."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from vllm_afbs.profile.record import Record


class AdapterLevel(Record):
    """The model with an adapter at one level, against the same dense, on held-out text."""

    kl: Annotated[float, Field(ge=0)] = Field(
        description="Mean divergence of its next-token distributions from the dense ones, nats."
    )
    holds: bool = Field(
        description="Whether the level's own figures hold with the adapter: it may run sparse."
    )


class AdapterProfile(Record):
    """A LoRA adapter that the tuner ran the model with."""

    name: str = Field(description="For information: a server may call it something else.")
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = Field(
        description="Of its adapter_config.json and pieces of its weights."
    )
    levels: list[AdapterLevel] = Field(description="One for each of the profile's, in their order.")


def check_adapters(adapters: Sequence[AdapterProfile], num_levels: int) -> None:
    """Raises ValueError unless adapters differ and have as many levels as the profile."""
    digests = [adapter.sha256 for adapter in adapters]
    for index, adapter in enumerate(adapters):
        if adapter.sha256 in digests[:index]:
            raise ValueError(
                f"adapters.{index}.sha256: another digest expected, adapters."
                f"{digests.index(adapter.sha256)} has this one"
            )
        if len(adapter.levels) != num_levels:
            raise ValueError(
                f"adapters.{index}.levels: {num_levels} expected, one for each of levels, "
                f"got {len(adapter.levels)}"
            )


def describe_adapters(adapters: Sequence[AdapterProfile], levels: Sequence[str]) -> str:
    """Names adapters with the levels that hold for them, in one line.

    Args:
        adapters: The adapters, of one profile.
        levels: Names of the profile's levels.
    """
    found = []
    for adapter in adapters:
        held = [name for name, own in zip(levels, adapter.levels, strict=True) if own.holds]
        where = ", ".join(held) if len(held) < len(levels) else "all levels"
        found.append(f"{adapter.name!r} ({where or 'no level'})")
    return ", ".join(found) or "none"
