"""Profiles of older schema versions: read as they were, and upgraded to one level.

In version 3, layers without full attention have no heads, and the fingerprint is that of the
layers with it. Version 2 has heads in every layer. Thresholds mean the same in both and now; in
version 1 they were for a selector that did not score single keys.
"""

from typing import Literal

from pydantic import Field, model_validator

from vllm_afbs.profile.schema import (
    LayerLevel,
    LayerProfile,
    Level,
    Profile,
    ProfileHeader,
    check_num_heads,
    check_num_layers,
)
from vllm_afbs.profile.tuner_run import TextSource, TunerRun

OLDER_VERSIONS = (2, 3)


class OlderProfile(ProfileHeader):
    """A profile of version 2 or 3: one set of thresholds."""

    schema_version: Literal[2, 3]
    layers: list[LayerLevel]
    calibration_texts: list[TextSource] = Field(default=[])
    tuner: TunerRun

    @model_validator(mode="after")
    def _counts_agree(self) -> "OlderProfile":
        check_num_layers(self.model, self.layers)
        for index, layer in enumerate(self.layers):
            if layer.heads or self.schema_version == 2:
                check_num_heads(self.model, layer, f"layers.{index}")
            elif layer.tolerance is not None:
                raise ValueError(f"layers.{index}.tolerance: null expected where heads are empty")
        if not any(layer.heads for layer in self.layers):
            raise ValueError("layers: heads expected in one of them at least")
        return self

    def upgraded(self) -> Profile:
        """The same thresholds as a profile of one level, which keeps the id."""
        level = Level.of_run(self.tuner, [layer for layer in self.layers if layer.heads])
        header = {name: getattr(self, name) for name in ProfileHeader.model_fields}
        del header["schema_version"]
        return Profile(
            **header,
            upgraded_from=self.schema_version,
            levels=[level],
            default_level=level.name,
            layers=[LayerProfile(levels=[layer] if layer.heads else []) for layer in self.layers],
            calibration_texts=self.calibration_texts,
            tuner=self.tuner,
        )
