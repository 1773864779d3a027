"""The profile: what the tuner found for one model, as validated data.

A profile is readable JSON. It is checked completely before a server uses it. A profile of another
model is refused with a message that names the field that differs.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator

from vllm_afbs.profile.adapters import AdapterProfile, check_adapters
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.record import Record
from vllm_afbs.profile.tuner_run import TextSource, TunedOn, TunerRun, WholeModel

SCHEMA_VERSION = 4
"""In version 4, a profile has levels. ``profile/older.py`` reads the versions before it."""

MIN_LAYER_SPARSITY = 0.1
"""Layers tuned to a lower sparsity run dense: selection would cost more than it saves."""


class Measurement(Record):
    """Error and sparsity of one head at one length."""

    length: Annotated[int, Field(gt=0)]
    error: Annotated[float, Field(ge=0)] = Field(description="Relative L1 against dense.")
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Share of the dense causal block products that is skipped."
    )


class HeadProfile(Record):
    """The thresholds of one query head."""

    tau: Annotated[float, Field(gt=0, le=1)] = Field(description="1 keeps every block: dense.")
    theta: Annotated[float, Field(ge=-1, le=1)]
    lambda_: None = Field(
        default=None, exclude=True, description="Of older versions, which have null here."
    )
    calibration: list[Measurement] = Field(default=[], description="One entry per length.")
    validation: Measurement | None = Field(
        default=None,
        description="On held-out text: the largest error of any text, and the mean sparsity.",
    )

    @model_validator(mode="after")
    def _lengths_differ(self) -> "HeadProfile":
        lengths = [measured.length for measured in self.calibration]
        if len(set(lengths)) < len(lengths):
            raise ValueError("calibration: each length once expected")
        return self


def mean_calibration(heads: Sequence[HeadProfile]) -> tuple[tuple[int, float], ...]:
    """Mean tuned sparsity of heads by length, shortest first; a head of tau = 1 has none."""
    by_length: dict[int, float] = {}
    for head in heads:
        for measured in head.calibration:
            sparsity = measured.sparsity if head.tau < 1 else 0.0
            by_length[measured.length] = by_length.get(measured.length, 0.0) + sparsity
    return tuple((length, total / len(heads)) for length, total in sorted(by_length.items()))


class LayerLevel(Record):
    """The query heads of one layer at one level, in the model's order."""

    heads: list[HeadProfile]
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Relative L1 allowed per head; null: the level's in all layers."
    )

    @property
    def is_sparse(self) -> bool:
        """Whether the layer was tuned to enough sparsity to run sparse."""
        calibration = mean_calibration(self.heads)
        return bool(calibration) and calibration[-1][1] >= MIN_LAYER_SPARSITY


class LayerProfile(Record):
    """One layer at each of the profile's levels, in their order."""

    levels: list[LayerLevel] = Field(
        description="Empty: the model's layer is no full attention over the whole context."
    )


class LengthEstimate(Record):
    """What a level is expected to save at one prompt length."""

    length: Annotated[int, Field(gt=0)]
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Mean of all heads with full attention."
    )
    attention_time_ratio: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Predicted time of prefill attention over that of dense; null: unknown.",
    )


class Level(Record):
    """One setting of the dial: thresholds for every head, and what they cost and gain."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,31}$")]
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Relative L1 per head that the level began from."
    )
    whole_model: WholeModel | None = None
    by_length: list[LengthEstimate] = Field(default=[], description="Shortest first.")

    @model_validator(mode="after")
    def _lengths_ascend(self) -> "Level":
        lengths = [each.length for each in self.by_length]
        if lengths != sorted(set(lengths)):
            raise ValueError("by_length: each length once expected, shortest first")
        return self

    @classmethod
    def of_run(cls, run: TunerRun, layers: Sequence[LayerLevel]) -> "Level":
        """The only level of a tuner that makes one.

        Args:
            run: The tuner's run.
            layers: The layers with full attention.
        """
        calibration = mean_calibration([head for layer in layers for head in layer.heads])
        return cls(
            name="tuned",
            tolerance=run.tolerance,
            whole_model=run.budget.allocated if run.budget is not None else None,
            by_length=[
                LengthEstimate(length=length, sparsity=sparsity) for length, sparsity in calibration
            ],
        )


class ProfileHeader(Record):
    """What a profile of any version says before its layers."""

    schema_version: int
    model_name: str
    model: ModelFingerprint
    model_weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        default=None,
        # Profiles without it keep their ids.
        exclude_if=lambda value: value is None,
        description="Of pieces of the weight files that were tuned. Left out: unknown.",
    )
    tuned_on: TunedOn | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="What ran the model. Left out: transformers, on weights that are not said.",
    )
    block_q: Annotated[int, Field(gt=0)]
    block_k: Annotated[int, Field(gt=0)]
    min_seq_len: Annotated[int, Field(gt=0)] = Field(
        description="Shortest calibrated context; shorter ones run dense."
    )
    max_seq_len: Annotated[int, Field(gt=0)] = Field(
        description="Longest calibrated context; longer ones run dense."
    )

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.min_seq_len > self.max_seq_len:
            raise ValueError("min_seq_len: at most max_seq_len expected")
        return self


class Profile(ProfileHeader):
    """Thresholds for every layer and head of one model, at one level or several."""

    schema_version: Literal[4] = 4
    upgraded_from: Literal[2, 3] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="Version of the file that this was read from first, which still gives the id.",
    )
    levels: Annotated[list[Level], Field(min_length=1)] = Field(
        description="From nearly lossless to fast."
    )
    default_level: str = Field(description="Name of the level that is served unless asked.")
    layers: list[LayerProfile]
    adapters: list[AdapterProfile] = Field(
        default=[],
        exclude_if=lambda value: not value,
        description="LoRA adapters that the levels were validated with. Left out: none.",
    )
    calibration_texts: list[TextSource] = Field(default=[])
    tuner: TunerRun

    @model_validator(mode="after")
    def _levels_agree(self) -> "Profile":
        names = [level.name for level in self.levels]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"levels.{index}.name: another name expected, {name!r} is taken")
        if self.default_level not in names:
            raise ValueError(
                f"default_level: one of {', '.join(names)} expected, got {self.default_level!r}"
            )
        return self

    @model_validator(mode="after")
    def _counts_agree(self) -> "Profile":
        check_num_layers(self.model, self.layers)
        check_adapters(self.adapters, len(self.levels))
        for index, layer in enumerate(self.layers):
            if layer.levels and len(layer.levels) != len(self.levels):
                raise ValueError(
                    f"layers.{index}.levels: {len(self.levels)} expected, one for each of levels, "
                    f"got {len(layer.levels)}"
                )
            for number, level in enumerate(layer.levels):
                check_num_heads(self.model, level, f"layers.{index}.levels.{number}")
        if not self.full_layers:
            raise ValueError("layers: levels expected in one of them at least")
        if self.upgraded_from is not None and self.levels != [
            Level.of_run(self.tuner, [self.layers[index].levels[0] for index in self.full_layers])
        ]:
            # The id is that of the older file, which says nothing else about levels.
            raise ValueError("upgraded_from: to be left out where levels are not the older file's")
        return self

    @property
    def full_layers(self) -> list[int]:
        """Indices of the layers with full attention."""
        return [index for index, layer in enumerate(self.layers) if layer.levels]

    @property
    def num_tuned_heads(self) -> int:
        """Number of heads in tuned layers; heads of other layers were not measured."""
        return sum(
            any(head.calibration for head in same_head)
            for layer in self.layers
            for same_head in zip(*(level.heads for level in layer.levels), strict=True)
        )

    @property
    def profile_id(self) -> str:
        """First 12 digits of the sha256 of the profile's canonical JSON.

        A profile that was upgraded keeps the id of the older file.
        """
        text = self.to_json() if self.upgraded_from is None else self._to_older_json()
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def level_index(self, name: str | None = None) -> int:
        """Place of a level in ``levels`` and in each layer's.

        Args:
            name: The level's name; None for the default level.

        Raises:
            ProfileError: There is no level of this name; the message lists those there are.
        """
        names = [level.name for level in self.levels]
        if name is not None and name not in names:
            raise ProfileError(f"level: one of {', '.join(names)} expected, got {name!r}")
        return names.index(self.default_level if name is None else name)

    def with_default(self, name: str) -> "Profile":
        """This profile with another default level, which is served unless another is asked for.

        Raises:
            ProfileError: There is no level of this name; the message lists those there are.
        """
        self.level_index(name)
        return self.model_copy(update={"default_level": name})

    def heads_of(self, level: int) -> list[HeadProfile]:
        """The heads of all layers with full attention at a level, layer by layer."""
        return [
            head for index in self.full_layers for head in self.layers[index].levels[level].heads
        ]

    def validated_adapters(self, level: int) -> frozenset[str]:
        """Digests of the LoRA adapters for which a level holds."""
        return frozenset(each.sha256 for each in self.adapters if each.levels[level].holds)

    def tolerance_of(self, layer: int, level: int) -> float:
        """Relative L1 error that the tuner allowed for each head of a layer at a level."""
        own = self.layers[layer].levels[level].tolerance
        return own or self.levels[level].tolerance or self.tuner.tolerance

    def to_json(self) -> str:
        """The profile as indented JSON with a closing newline."""
        return self.model_dump_json(indent=1) + "\n"

    def _to_older_json(self) -> str:
        data = self.model_dump(exclude={"upgraded_from", "levels", "default_level"})
        data["schema_version"] = self.upgraded_from
        no_heads: list[dict[str, Any]] = [{"heads": [], "tolerance": None}]
        data["layers"] = [(layer["levels"] or no_heads)[0] for layer in data["layers"]]
        for layer in data["layers"]:
            layer["heads"] = [
                {name: head.get(name) for name in HeadProfile.model_fields}
                for head in layer["heads"]
            ]
        return TypeAdapter(dict[str, Any]).dump_json(data, indent=1).decode() + "\n"

    def check_model(self, model: ModelFingerprint, source: str) -> None:
        """Refuses a model other than the one that was tuned.

        Args:
            model: The served model's fingerprint.
            source: Where the profile came from, for the message.

        Raises:
            ProfileError: Some field differs; the message names it.
        """
        if difference := self.model.difference(model):
            raise ProfileError(f"{source}: profile of another model: {difference}")


def check_num_layers(model: ModelFingerprint, layers: Sequence[object]) -> None:
    """Raises ValueError unless there are as many layers as the model has."""
    if len(layers) != model.num_layers:
        raise ValueError(
            f"layers: {model.num_layers} expected by model.num_layers, got {len(layers)}"
        )


def check_num_heads(model: ModelFingerprint, layer: LayerLevel, field: str) -> None:
    """Raises ValueError unless a layer has as many heads as the model has."""
    if len(layer.heads) != model.num_heads:
        raise ValueError(
            f"{field}.heads: {model.num_heads} expected by model.num_heads, got {len(layer.heads)}"
        )
