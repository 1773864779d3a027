"""The scale that tau is searched on: *depth*, ``-log(1 - tau)``.

On it, the log of a head's error is close to a line.
"""

import torch

MAX_DEPTH = 9.0
"""tau 0.9999, beyond which a head runs dense."""
MIN_DEPTH = 0.05
"""tau 0.05, which drops all but what is always kept on any model."""
START_SLOPE = 0.8
"""-d log(error) / d depth of a head that was not measured yet: the middle of what SmolLM2-135M's
heads have at lengths to 8192, 0.5 to 1.2. It is only where the search begins: each head's own slope
replaces it after two scores."""
SLOPES = (0.25, 2.5)
"""Bounds of a measured slope, since a line through two close points can have any: about half and
twice the range of SmolLM2-135M's heads."""


def depth_of(tau: torch.Tensor) -> torch.Tensor:
    """The depth of a tau."""
    return -torch.log1p(-tau.clamp_max(1 - 1e-6))


def tau_of(depth: torch.Tensor) -> torch.Tensor:
    """Inverse of ``depth_of``."""
    return -torch.expm1(-depth)
