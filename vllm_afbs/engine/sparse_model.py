"""Candidate thresholds in a loaded engine: the tuner's ``SparseModel``."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_afbs.engine.layers import RunsDenseError
from vllm_afbs.errors import InputError
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.adapters import AdapterLevel, AdapterProfile
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
    adapters: Mapping[str, str],
) -> Profile:
    """A profile that makes some layers sparse at every length, as the search's own runs do.

    Args:
        model: The model.
        thresholds: Thresholds of the layers that run sparse, by the layer's index.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        longest: Tokens of the longest prompt.
        adapters: Digest of each LoRA adapter's files, by its name; all of them run sparse.
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
        adapters=[
            AdapterProfile(name=name, sha256=sha256, levels=[AdapterLevel(kl=0.0, holds=True)])
            for name, sha256 in adapters.items()
        ],
        tuner=run,
    )


class EngineSparseModel:
    """A model in vLLM's process whose layers can be made sparse.

    Args:
        engine: The engine.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        adapter: Name of the LoRA adapter that it runs with, if any.
    """

    def __init__(
        self, engine: "VllmEngine", block_q: int, block_k: int, adapter: str | None = None
    ) -> None:
        self._engine = engine
        self._blocks = block_q, block_k
        self._adapter = adapter
        self._dense_losses: dict[str, float] = {}

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        """See ``tuning.engine.SparseModel``."""
        self._engine.loaded()
        name = hashlib.sha256(repr(list(tokens)).encode()).hexdigest()
        positions = compared_positions(len(tokens))
        if name not in self._dense_losses:
            self._engine.serve(None)
            losses, _ = self._engine.score(tokens, positions, keep=name, adapter=self._adapter)
            self._dense_losses[name] = float(losses.double().mean())
        self._serve(tokens, thresholds)
        before = self._num_kept_dense()
        losses, kl = self._engine.score(tokens, positions, against=name, adapter=self._adapter)
        if thresholds and self._num_kept_dense() > before:
            raise InputError(
                f"--lora-modules: {self._adapter}: vLLM has loaded other files than were there at "
                "start"
            )
        return Compared(self._dense_losses[name], float(losses.double().mean()), kl)

    def losses(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> torch.Tensor:
        """See ``tuning.engine.SparseModel``."""
        self._engine.loaded()
        self._serve(tokens, thresholds)
        losses, _ = self._engine.score(tokens, range(len(tokens) - 1), adapter=self._adapter)
        return losses

    def _num_kept_dense(self) -> float:
        """Prefills so far that ran dense because vLLM does not take the adapter for ours."""
        if self._adapter is None:
            return 0.0
        return self._engine.fallbacks().get("active_adapter", 0.0)

    def _serve(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> None:
        if not thresholds:
            self._engine.serve(None)
            return
        described = self._engine.description
        profile = candidate(
            self._engine.fingerprint, thresholds, *self._blocks, len(tokens), described.adapters
        )
        try:
            self._engine.serve(profile, always_sparse=True)
        except RunsDenseError as error:
            raise InputError(
                f"{error}; --search one-tolerance tunes the model without running it sparse"
            ) from None


@dataclass(frozen=True)
class EngineAdapter:
    """A LoRA adapter in vLLM's process: the tuner's ``Adapter``.

    Attributes:
        engine: The engine.
        name: What the user calls it.
        sha256: Digest of its files.
    """

    engine: "VllmEngine"
    name: str
    sha256: str

    def sparse_model(self, block_q: int, block_k: int) -> EngineSparseModel:
        """See ``tuning.engine.Adapter``."""
        return self.engine.sparse_model(block_q, block_k, self.name)
