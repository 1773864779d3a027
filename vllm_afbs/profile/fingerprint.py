"""What identifies the architecture that a profile was tuned on."""

from typing import Annotated, Any

from pydantic import Field

from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.record import Record


class ModelFingerprint(Record):
    """The parts of a model's configuration that must be equal in the tuned and the served model."""

    architecture: str
    num_layers: Annotated[int, Field(gt=0)]
    num_heads: Annotated[int, Field(gt=0)]
    num_kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    rope: dict[str, Any] = Field(description="The rotary embedding's parameters, as configured.")

    @classmethod
    def from_config(cls, config: Any) -> "ModelFingerprint":
        """Reads the fingerprint from a Hugging Face configuration.

        Args:
            config: A ``PretrainedConfig``. Of a multimodal model, its text part is read.

        Raises:
            ProfileError: The configuration lacks a field that every supported decoder has.
        """
        text = config.get_text_config()
        try:
            num_heads = int(text.num_attention_heads)
            return cls(
                architecture=(config.architectures or [type(config).__name__])[0],
                num_layers=int(text.num_hidden_layers),
                num_heads=num_heads,
                num_kv_heads=int(getattr(text, "num_key_value_heads", None) or num_heads),
                head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // num_heads),
                rope=_rope_parameters(text),
            )
        except AttributeError as error:
            raise ProfileError(
                f"config.json: {error.name!r} expected: not a supported decoder model"
            ) from None

    def difference(self, other: "ModelFingerprint") -> str | None:
        """Names the first field that differs, with both values; None if all are equal."""
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"model.{field} is {mine!r} in the profile and {theirs!r} in the model"
        return None


def _rope_parameters(config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        theta = getattr(config, "rope_theta", None)
        parameters = {"rope_theta": theta, **(getattr(config, "rope_scaling", None) or {})}
    return {name: value for name, value in sorted(parameters.items()) if value is not None}
