"""What the stages of a layer's search hand on, and what the journal keeps of them.

A ``Trial`` is one search on tau under one theta per head. ``explore`` makes one ``Explored`` of a
layer's trials, ``refine`` a ``Refined`` and ``validation`` the ``Validated`` heads of the profile.
"""

from dataclasses import dataclass

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import HeadProfile
from vllm_afbs.tuning.journal import Float32, Float64, Result


@dataclass(frozen=True, eq=False)
class Candidate(Result):
    """Thresholds that the heads may take.

    Unless they are ``Refined``, tau is read off a line and was not scored itself.

    Attributes:
        theta: ``[num_heads]``, fp32.
        tau: Where the line meets the tolerance, ``[num_heads]``, fp32; 1 (dense) if nowhere.
        slope: ``-d log(error) / d depth``, ``[num_heads]``, fp32; see ``bracket``.
        sparsity: Share of the block products skipped, ``[num_heads]``, fp64; 0 where dense.
    """

    theta: Float32
    tau: Float32
    slope: Float32
    sparsity: Float64

    @property
    def thresholds(self) -> HeadThresholds:
        """Tau and theta."""
        return HeadThresholds(self.tau, self.theta)


@dataclass(frozen=True, eq=False)
class Trial(Candidate):
    """A trial of stage 1.

    Attributes:
        sparsity: In fp32, ``[num_heads]``: trials are compared with each other only.
        length: Tokens of context that it was made at.
    """

    sparsity: Float32
    length: int


@dataclass(frozen=True, eq=False)
class ThetaTrial(Trial):
    """A trial of stage 1 with one quantile of theta for the whole layer.

    Attributes:
        quantile: Share of the blocks with a self-similarity below theta; see
            ``LayerEvaluator.theta_at``.
    """

    quantile: float


@dataclass(frozen=True, eq=False)
class Attempt(Result):
    """A theta trial, or None where no further quantile promised anything new."""

    trial: ThetaTrial | None


@dataclass(frozen=True, eq=False)
class Explored(Result):
    """Where stage 1 ended, at the longest length.

    Attributes:
        best: What each head skips most with.
        without_theta: The trial with theta off.
    """

    best: Candidate
    without_theta: Candidate


@dataclass(frozen=True, eq=False)
class Refined(Candidate):
    """Where stage 2 ended: thresholds that were scored within the tolerance.

    Attributes:
        error: Relative L1 on the calibration text, ``[num_heads]``, fp64; 0 where dense.
    """

    error: Float64


@dataclass(frozen=True, eq=False)
class Validated(Result):
    """Where stage 3 ended.

    Attributes:
        heads: The heads' entries in the profile.
    """

    heads: tuple[HeadProfile, ...]
