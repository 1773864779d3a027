"""Candidate thresholds in a loaded engine: the tuner's ``SparseModel``."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_afbs.engine.layers import RunsDenseError
from vllm_afbs.errors import InputError
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import (
    HeadProfile,
    LayerLevel,
    LayerProfile,
    Level,
    Measurement,
    Profile,
)
from vllm_afbs.profile.tuner_run import TunerRun
from vllm_afbs.tuning.engine import Compared, compared_positions

if TYPE_CHECKING:
    from vllm_afbs.engine.client import VllmEngine

_DENSE = HeadProfile(tau=1.0, theta=-1.0)


def candidate(
    model: ModelFingerprint,
    thresholds: Mapping[int, HeadThresholds],
    block_q: int,
    block_k: int,
    longest: int,
) -> Profile:
    """A profile that makes some layers sparse at every length, as the search's own runs do.

    Args:
        model: The model.
        thresholds: Thresholds of the layers that run sparse, by the layer's index.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        longest: Tokens of the longest prompt.
    """
    # An engine that is told to run always sparse reads nothing from the expected sparsity, but a
    # layer without one counts as not tuned.
    expected = [Measurement(length=longest, error=0.0, sparsity=0.5)]

    def layer(index: int) -> LayerLevel:
        if index not in thresholds:
            return LayerLevel(heads=[_DENSE] * model.num_heads)
        own = thresholds[index]
        return LayerLevel(
            heads=[
                HeadProfile(tau=tau, theta=theta, calibration=expected)
                for tau, theta in zip(own.tau.tolist(), own.theta.tolist(), strict=True)
            ]
        )

    run = TunerRun(
        version="candidate", created_at="", seed=0, tolerance=0.05, lengths=[longest],
        evaluations=0, cost=0.0, wall_seconds=0.0,
    )  # fmt: skip
    layers = [layer(index) for index in range(model.num_layers)]
    level = Level.of_run(run, layers)
    return Profile(
        model_name="candidate",
        model=model,
        block_q=block_q,
        block_k=block_k,
        min_seq_len=1,
        max_seq_len=longest,
        levels=[level],
        default_level=level.name,
        layers=[LayerProfile(levels=[each]) for each in layers],
        tuner=run,
    )


class EngineSparseModel:
    """A model in vLLM's process whose layers can be made sparse.

    Args:
        engine: The engine.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
    """

    def __init__(self, engine: "VllmEngine", block_q: int, block_k: int) -> None:
        self._engine = engine
        self._blocks = block_q, block_k
        self._dense_losses: dict[str, float] = {}

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        """See ``tuning.engine.SparseModel``."""
        self._engine.loaded()
        name = hashlib.sha256(repr(list(tokens)).encode()).hexdigest()
        positions = compared_positions(len(tokens))
        if name not in self._dense_losses:
            self._engine.serve(None)
            losses, _ = self._engine.score(tokens, positions, keep=name)
            self._dense_losses[name] = float(losses.double().mean())
        self._serve(tokens, thresholds)
        losses, kl = self._engine.score(tokens, positions, against=name)
        return Compared(self._dense_losses[name], float(losses.double().mean()), kl)

    def losses(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> torch.Tensor:
        """See ``tuning.engine.SparseModel``."""
        self._engine.loaded()
        self._serve(tokens, thresholds)
        losses, _ = self._engine.score(tokens, range(len(tokens) - 1))
        return losses

    def _serve(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> None:
        if not thresholds:
            self._engine.serve(None)
            return
        profile = candidate(self._engine.fingerprint, thresholds, *self._blocks, len(tokens))
        try:
            self._engine.serve(profile, always_sparse=True)
        except RunsDenseError as error:
            raise InputError(
                f"{error}; --search one-tolerance tunes the model without running it sparse"
            ) from None
