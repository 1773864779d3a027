"""What an arm of the benchmark is, what it returns, and what several arms share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_afbs.captures import Capture, LayerTensors
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings


@dataclass(frozen=True)
class Found:
    """What an arm chose for one layer, and what it spent.

    Attributes:
        tau: ``[num_heads]``; 1 is dense.
        theta: ``[num_heads]``.
        evaluations: Heads scored.
        cost: Their cost.
        validation: How many of the evaluations were for validation on held-out text, which only
            some arms do.
    """

    tau: torch.Tensor
    theta: torch.Tensor
    evaluations: float
    cost: float
    validation: float = 0.0


Arm = Callable[[SearchSettings, Sequence[int], Capture], list[Found]]
"""Tunes the given layers of a capture."""

LayerArm = Callable[[SearchSettings, int, Capture], Found]
"""Tunes one layer."""


def by_layer(tune: LayerArm) -> Arm:
    """An arm whose layers have nothing to do with each other."""

    def run(settings: SearchSettings, layers: Sequence[int], capture: Capture) -> list[Found]:
        return [tune(settings, layer, capture) for layer in layers]

    return run


Sweep = Callable[[LayerScorer, SearchSettings], "Best"]
"""Scores a layer until it has something; what that took is read off the scorer."""


def swept(sweep: Sweep) -> Arm:
    """An arm that scores each layer on the calibration text alone."""

    def tune(settings: SearchSettings, layer: int, capture: Capture) -> Found:
        scorer = LayerScorer(settings, layer, capture)
        best = sweep(scorer, settings)
        return Found(best.tau, best.theta, scorer.evaluations, scorer.cost)

    return by_layer(tune)


class Best:
    """The sparsest thresholds within the tolerance seen so far, per head."""

    def __init__(self, num_heads: int, tolerance: float) -> None:
        """Begins dense."""
        self.tau = torch.ones(num_heads)
        self.theta = torch.full((num_heads,), THETA_OFF)
        self.sparsity = torch.zeros(num_heads, dtype=torch.float64)
        self._tolerance = tolerance

    def see(
        self, thresholds: HeadThresholds, error: torch.Tensor, sparsity: torch.Tensor
    ) -> torch.Tensor:
        """Takes what is better; returns which heads are within the tolerance."""
        within = error <= self._tolerance
        better = within & (sparsity > self.sparsity)
        self.sparsity = torch.where(better, sparsity, self.sparsity)
        self.tau = torch.where(better, thresholds.tau, self.tau)
        self.theta = torch.where(better, thresholds.theta, self.theta)
        return within


@dataclass(frozen=True)
class HeadCapture(Capture):
    """A capture of which one query head is seen, as a layer of one head.

    Attributes:
        head: The query head, in every layer.
    """

    head: int

    def load(self, layer: int, window: str) -> LayerTensors:
        """Reads that head's Q, and the K and V that it attends to."""
        tensors = super().load(layer, window)
        kv_head = self.head * tensors.key.shape[1] // tensors.query.shape[1]
        return LayerTensors(
            tensors.query[:, self.head, None],
            tensors.key[:, kv_head, None],
            tensors.value[:, kv_head, None],
            tensors.softmax_scale,
        )
