"""The profile: what the tuner found for one model, as validated data.

A profile is JSON that a person can read. It is checked completely before a server uses it, and
one that does not fit the model is refused with the field that differs.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_afbs.profile.rope import rope_difference, rope_parameters, rope_value

SCHEMA_VERSION = 2
"""2: thresholds of the selector that scores single keys, too; those of 1 mean something else."""

MIN_LAYER_SPARSITY = 0.1
"""A layer tuned to less than this runs in the dense parent: selection would not pay."""

_MAX_MESSAGE = 1000


class ProfileError(ValueError):
    """A profile that must not be served; the message is one line for the user.

    What a message quotes comes from files, so it is escaped and cut short here.
    """

    def __init__(self, message: str) -> None:
        """Makes one line of a message."""
        line = printable(message[: _MAX_MESSAGE + 1])
        super().__init__(line if len(line) <= _MAX_MESSAGE else f"{line[:_MAX_MESSAGE]}...")


def printable(text: str) -> str:
    """The text on one line: what a terminal would obey is escaped as in Python."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


class _Record(BaseModel):
    # Unknown fields are refused: a mistyped name must not silently become a default.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelFingerprint(_Record):
    """What must be equal between the tuned and the served model."""

    architecture: str = Field(description="For information: another name may have these layers.")
    num_layers: Annotated[int, Field(gt=0)]
    num_heads: Annotated[int, Field(gt=0)]
    num_kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    rope: dict[str, Any] = Field(description="The rotary embedding's parameters, as configured.")

    @classmethod
    def from_config(cls, config: Any) -> "ModelFingerprint":
        """Reads the fingerprint off a Hugging Face configuration.

        Args:
            config: A ``PretrainedConfig``; of a multimodal one the text part counts.

        Raises:
            ProfileError: The configuration lacks a field that every supported decoder has, or one
                is no whole number from 1 on.
        """
        text = config.get_text_config()
        num_heads = _count(text, "num_attention_heads")
        num_kv_heads = _count(text, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ProfileError(
                f"config.json: num_key_value_heads: a divisor of num_attention_heads ({num_heads}) "
                f"expected, got {num_kv_heads}"
            )
        head_dim = _count(text, "head_dim", None) or _count(text, "hidden_size") // num_heads
        if head_dim < 1:
            raise ProfileError(
                "config.json: hidden_size: at least num_attention_heads "
                f"({num_heads}) expected where head_dim is not given"
            )
        return cls(
            architecture=(config.architectures or [type(config).__name__])[0],
            num_layers=_count(text, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope_parameters(text),
        )

    def difference(self, other: "ModelFingerprint") -> str | None:
        """Names the first thing that differs, with both values; None if the layers are alike.

        Architectures are not compared: the same layers go by several names, as in a model's own
        format, or with another head.
        """
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"model.{field} is {mine!r} in the profile and {theirs!r} in the model"
        if name := rope_difference(self.rope, other.rope):
            mine, theirs = rope_value(self.rope, name), rope_value(other.rope, name)
            return f"model.rope.{name} is {mine!r} in the profile and {theirs!r} in the model"
        return None


_REQUIRED: Any = object()


def _count(text: Any, name: str, default: Any = _REQUIRED) -> Any:
    """A field of a configuration that counts something; the default where it is null or absent."""
    value = getattr(text, name, None)
    if value is None and default is not _REQUIRED:
        return default
    if value is None:
        raise ProfileError(f"config.json: {name!r} expected: not a supported decoder model")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ProfileError(
            f"config.json: {name}: a whole number from 1 on expected, got {value!r:.100}"
        )
    return value


class Measurement(_Record):
    """Error and sparsity of one head at one length."""

    length: Annotated[int, Field(gt=0)]
    error: Annotated[float, Field(ge=0)] = Field(description="Relative L1 against dense.")
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Share of the dense causal block products that is skipped."
    )


class HeadProfile(_Record):
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


class LayerProfile(_Record):
    """The query heads of one layer, in the model's order."""

    heads: list[HeadProfile]
    tolerance: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Relative L1 allowed per head; null: the tuner's for all layers."
    )

    @property
    def is_sparse(self) -> bool:
        """Whether it was tuned to enough sparsity to be served sparse."""
        calibration = mean_calibration(self.heads)
        return bool(calibration) and calibration[-1][1] >= MIN_LAYER_SPARSITY


class TextSource(_Record):
    """A text that the thresholds were tuned or validated on."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    num_tokens: Annotated[int, Field(gt=0)]


class WholeModel(_Record):
    """The whole model on held-out text at the longest length, against itself run dense."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(description="Mean over heads.")
    kl: Annotated[float, Field(ge=0)] = Field(
        description="Mean divergence of its next-token distributions from the dense ones, nats."
    )
    perplexity: Annotated[float, Field(ge=1)]
    dense_perplexity: Annotated[float, Field(ge=1)]


class BudgetRun(_Record):
    """How tolerances were divided among layers for a goal of the whole model's."""

    goal: Literal["sparsity", "perplexity"]
    target: Annotated[float, Field(gt=0)] = Field(
        description="Least sparsity, or largest increase of perplexity, as a ratio."
    )
    uniform: WholeModel = Field(description="With the tuner's tolerance in every layer.")
    allocated: WholeModel = Field(description="With each layer's own.")


class TunerRun(_Record):
    """How the profile was made, and what it cost."""

    version: str
    created_at: str = Field(description="UTC, ISO 8601.")
    seed: int
    tolerance: Annotated[float, Field(gt=0)] = Field(description="Relative L1 allowed per head.")
    lengths: Annotated[list[int], Field(min_length=1)]
    budget: BudgetRun | None = None
    settings: dict[str, Any] = {}
    evaluations: Annotated[int, Field(ge=0)] = Field(
        description="(head, thresholds, length, rows) scored against dense, cached or not."
    )
    cost: Annotated[float, Field(ge=0)] = Field(
        description="Evaluations weighted by (length / longest)^2 x share of the rows."
    )
    wall_seconds: Annotated[float, Field(ge=0)] = Field(
        description="Of all steps added up; those of several workers overlap."
    )


class Profile(_Record):
    """Thresholds for every layer and head of one model."""

    schema_version: Literal[2] = 2
    model_name: str
    model: ModelFingerprint
    model_weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = Field(
        default=None, description="Of pieces of the weight files that were tuned; null: unknown."
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
    calibration_texts: list[TextSource] = []
    tuner: TunerRun

    @model_validator(mode="after")
    def _counts_agree(self) -> "Profile":
        if len(self.layers) != self.model.num_layers:
            raise ValueError(
                f"layers: {self.model.num_layers} expected by model.num_layers, "
                f"got {len(self.layers)}"
            )
        for index, layer in enumerate(self.layers):
            if len(layer.heads) != self.model.num_heads:
                raise ValueError(
                    f"layers.{index}.heads: {self.model.num_heads} expected by model.num_heads, "
                    f"got {len(layer.heads)}"
                )
        if self.min_seq_len > self.max_seq_len:
            raise ValueError("min_seq_len: at most max_seq_len expected")
        return self

    @property
    def num_tuned_heads(self) -> int:
        """Heads of the layers that were tuned: the others were not measured."""
        return sum(bool(head.calibration) for layer in self.layers for head in layer.heads)

    @property
    def profile_id(self) -> str:
        """First 12 digits of the sha256 of the profile's canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def tolerance_of(self, layer: int) -> float:
        """Relative L1 that was allowed per head of a layer."""
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
