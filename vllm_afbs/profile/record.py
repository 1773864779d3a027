"""The base class of every object in a profile."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable object that takes only known fields and finite numbers."""

    # Unknown fields are refused: a mistyped name must not silently become a default.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
