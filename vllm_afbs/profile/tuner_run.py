"""How a profile was made: on what, by what, and what it reached."""

from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_afbs.profile.record import Record


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

    goal: Literal["sparsity", "speedup", "perplexity", "kl"]
    target: Annotated[float, Field(gt=0)] = Field(
        description="Least sparsity or speedup of attention, or largest increase of perplexity, as "
        "ratios; or largest divergence, in nats."
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
