"""What identifies the layers that a profile was tuned on."""

from typing import Annotated, Any

from pydantic import Field

from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.layers import full_attention_config
from vllm_afbs.profile.record import Record
from vllm_afbs.profile.rope import rope_difference, rope_parameters, rope_value


class ModelFingerprint(Record):
    """The parts of a model's configuration that must be equal in the tuned and the served model.

    Heads and positions are those of the layers with full attention: others may have their own.
    """

    architecture: str = Field(description="For information: another name may have these layers.")
    num_layers: Annotated[int, Field(gt=0)]
    num_heads: Annotated[int, Field(gt=0)]
    num_kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    rope: dict[str, Any] = Field(description="The rotary embedding's parameters, as configured.")

    @classmethod
    def from_config(cls, config: Any) -> "ModelFingerprint":
        """Reads the fingerprint from a Hugging Face configuration.

        Args:
            config: A ``PretrainedConfig``; of a multimodal model, its text part is read.

        Raises:
            ProfileError: The configuration lacks a field that every supported decoder has, or one
                is no whole number from 1 on.
        """
        text = config.get_text_config()
        num_layers = _count(text, "num_hidden_layers")
        text = full_attention_config(text)
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
            num_layers=num_layers,
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
