"""The profile: what the tuner found for one model, as validated data.

A profile is readable JSON. It is checked completely before a server uses it. A profile of another
model is refused with a message that names the field that differs.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.record import Record

SCHEMA_VERSION = 3
"""In version 3, layers without full attention have no heads, and the fingerprint is that of the
layers with it. Version 2 has heads in every layer. Thresholds mean the same in both; in version 1
they were for a selector that did not score single keys."""

READ_VERSIONS = (2, SCHEMA_VERSION)

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
    lambda_: Annotated[float, Field(le=0)] | None = Field(
        default=None, description="Log-space bound under which P.V is skipped; null: never."
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


class LayerProfile(Record):
    """The query heads of one layer, in the model's order."""

    heads: list[HeadProfile] = Field(
        description="Empty: the model's layer is no full attention over the whole context."
    )
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Relative L1 allowed per head; null: the tuner's for all layers."
    )

    @property
    def is_sparse(self) -> bool:
        """Whether the layer was tuned to enough sparsity to run sparse."""
        calibration = mean_calibration(self.heads)
        return bool(calibration) and calibration[-1][1] >= MIN_LAYER_SPARSITY


class TextSource(Record):
    """A text that the thresholds were tuned or validated on."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = Field(
        description="Of the text that was read, in UTF-8."
    )
    num_tokens: Annotated[int, Field(gt=0)]
    coverage: str | None = Field(
        default=None,
        # Profiles of whole files stay as they were before this field, and so do their ids.
        exclude_if=lambda value: value is None,
        description="What was read of it: which part, column and rows. Left out: the whole file.",
    )


class TunedOn(Record):
    """What ran the model while its layers were captured."""

    engine: str = Field(description="Its name and version.")
    quantization: str | None = Field(
        default=None, description="How the weights are quantised; null: they are not."
    )
    kv_cache_dtype: str = Field(
        default="auto", description="Of the keys and values that the engine kept."
    )


class WholeModel(Record):
    """The whole model, sparse against dense, on held-out text at the longest length."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(description="Mean over heads.")
    kl: Annotated[float, Field(ge=0)] = Field(
        description="Mean divergence of its next-token distributions from the dense ones, nats."
    )
    perplexity: Annotated[float, Field(ge=1)]
    dense_perplexity: Annotated[float, Field(ge=1)]


class TextPart(Record):
    """A part of a calibration text, in tokens."""

    text: str = Field(description="Name of the text.")
    start: Annotated[int, Field(ge=0)]
    num_tokens: Annotated[int, Field(gt=0)]


class Acceptance(Record):
    """How a promise about perplexity was checked on windows that the search had not seen."""

    increase: float = Field(description="Measured increase of perplexity, as a ratio.")
    bound: float = Field(description="Upper confidence bound of the increase; at most the target.")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Of the bound, all candidates that may be tried taken together."
    )
    candidate: Annotated[int, Field(gt=0)] = Field(
        description="Which candidate it is: those before it missed the target."
    )
    num_blocks: Annotated[int, Field(gt=1)] = Field(
        description="Equal parts of the windows, the bound's independent samples."
    )
    windows: Annotated[list[TextPart], Field(min_length=1)]


class BudgetRun(Record):
    """How tolerances were divided among layers to reach a goal for the whole model."""

    goal: Literal["sparsity", "perplexity"]
    target: Annotated[float, Field(gt=0)] = Field(
        description="Least sparsity, or largest increase of perplexity, as a ratio."
    )
    uniform: WholeModel = Field(description="With the tuner's tolerance in every layer.")
    allocated: WholeModel = Field(description="With each layer's own.")
    acceptance: Acceptance | None = Field(
        default=None,
        # Profiles without it keep their identity.
        exclude_if=lambda value: value is None,
        description="Of a perplexity; null in profiles that were made without.",
    )


class TunerRun(Record):
    """How the profile was made, and what it cost."""

    version: str
    created_at: str = Field(description="UTC, ISO 8601.")
    seed: int
    tolerance: Annotated[float, Field(gt=0)] = Field(description="Relative L1 allowed per head.")
    lengths: Annotated[list[int], Field(min_length=1)]
    budget: BudgetRun | None = None
    settings: dict[str, Any] = Field(default={})
    evaluations: Annotated[int, Field(ge=0)] = Field(
        description="(head, thresholds, length, rows) scored against dense, cached or not."
    )
    cost: Annotated[float, Field(ge=0)] = Field(
        description="Evaluations weighted by (length / longest)^2 x share of the rows."
    )
    wall_seconds: Annotated[float, Field(ge=0)] = Field(
        description="Of all steps added up; those of several workers overlap."
    )


class Profile(Record):
    """Thresholds for every layer and head of one model."""

    schema_version: Literal[2, 3] = 3
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
    layers: list[LayerProfile]
    calibration_texts: list[TextSource] = Field(default=[])
    tuner: TunerRun

    @model_validator(mode="after")
    def _counts_agree(self) -> "Profile":
        if len(self.layers) != self.model.num_layers:
            raise ValueError(
                f"layers: {self.model.num_layers} expected by model.num_layers, "
                f"got {len(self.layers)}"
            )
        for index, layer in enumerate(self.layers):
            may_be_empty = self.schema_version != 2 and not layer.heads
            if len(layer.heads) != self.model.num_heads and not may_be_empty:
                raise ValueError(
                    f"layers.{index}.heads: {self.model.num_heads} expected by model.num_heads, "
                    f"got {len(layer.heads)}"
                )
        if not self.full_layers:
            raise ValueError("layers: heads expected in one of them at least")
        if self.min_seq_len > self.max_seq_len:
            raise ValueError("min_seq_len: at most max_seq_len expected")
        return self

    @property
    def full_layers(self) -> list[int]:
        """Indices of the layers with full attention."""
        return [index for index, layer in enumerate(self.layers) if layer.heads]

    @property
    def num_tuned_heads(self) -> int:
        """Number of heads in tuned layers; heads of other layers were not measured."""
        return sum(bool(head.calibration) for layer in self.layers for head in layer.heads)

    @property
    def profile_id(self) -> str:
        """First 12 digits of the sha256 of the profile's canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def tolerance_of(self, layer: int) -> float:
        """Relative L1 error that the tuner allowed for each head of a layer."""
        return self.layers[layer].tolerance or self.tuner.tolerance

    def to_json(self) -> str:
        """The profile as indented JSON with a closing newline."""
        return self.model_dump_json(indent=1) + "\n"

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
