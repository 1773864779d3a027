"""What thresholds are worth on a text that no arm saw, at the longest length with all rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.tuning.device import compute_device
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, START_SLOPE, depth_of, tau_of
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.scorer import SearchSettings

CLOSE = 0.005
"""How near to the tolerance, in shares of it, a mean error counts as equal."""
_MOST_SHIFT = 4.0  # in depth: the error grows or shrinks more than tenfold
_MOST_STEPS = 16
_LEAST_SLOPE = 0.2  # where few heads are moved, their error stands still and jumps


@dataclass(frozen=True)
class Choice:
    """An arm's choice for one head, and what it spent on it.

    Attributes:
        layer: Its layer.
        head: Its number there.
        tau: 1 is dense.
        theta: Threshold of the blocks' self-similarity.
        evaluations: A head's share of its layer's.
        cost: Likewise.
        validation: Likewise; of the evaluations, those on held-out text.
    """

    layer: int
    head: int
    tau: float
    theta: float
    evaluations: float
    cost: float
    validation: float


@dataclass(frozen=True)
class Worth:
    """Means over heads.

    Attributes:
        error: Relative L1.
        sparsity: Share of block products skipped.
    """

    error: float
    sparsity: float


class Meter:
    """Evaluators of one text, kept for all arms.

    Args:
        settings: Of every arm.
        capture: Tensors of the text: the unseen one, or for ``sparsity`` any.
    """

    def __init__(self, settings: SearchSettings, capture: Capture) -> None:
        self._settings = settings
        self._capture = capture
        self._evaluators: dict[int, LayerEvaluator] = {}

    def worth(self, choices: Sequence[Choice], shift: float = 0.0) -> Worth:
        """Measures choices, the depth of every sparse head moved by ``shift``."""
        errors, sparsities = [], []
        for layer, heads, thresholds in self._by_layer(choices, shift):
            scores = self._evaluator(layer).score(thresholds)
            dense = thresholds.tau >= 1.0
            errors.append(scores.error.masked_fill(dense, 0.0)[heads])
            sparsities.append(scores.sparsity.masked_fill(dense, 0.0)[heads])
        return Worth(float(torch.cat(errors).mean()), float(torch.cat(sparsities).mean()))

    def sparsity(self, choices: Sequence[Choice]) -> float:
        """Their mean sparsity alone, which attends to nothing."""
        sparsities = []
        for layer, heads, thresholds in self._by_layer(choices, 0.0):
            sparsity = self._evaluator(layer).sparsity(thresholds)
            sparsities.append(sparsity.masked_fill(thresholds.tau >= 1.0, 0.0)[heads])
        return float(torch.cat(sparsities).mean())

    def at_tolerance(self, choices: Sequence[Choice]) -> Worth:
        """Moves all sparse heads' depths alike until the mean error is the tolerance.

        A measuring device, not a tuner: it looks at the text that nobody may see, and is counted
        for no arm. Heads that an arm left dense stay dense.
        """
        seen: dict[float, Worth] = {}

        def error_at(shift: float) -> float:
            seen[shift] = self.worth(choices, shift)
            return seen[shift].error

        return seen[meet(error_at, self._settings.tolerance)]

    def _by_layer(
        self, choices: Sequence[Choice], shift: float
    ) -> Iterator[tuple[int, torch.Tensor, HeadThresholds]]:
        """Each layer, its heads that were chosen for, and all its heads' thresholds."""
        for layer in sorted({choice.layer for choice in choices}):
            here = [choice for choice in choices if choice.layer == layer]
            heads = torch.tensor([choice.head for choice in here])
            tau = torch.ones(self._evaluator(layer).num_heads)
            theta = torch.full_like(tau, THETA_OFF)
            tau[heads] = torch.tensor([choice.tau for choice in here])
            theta[heads] = torch.tensor([choice.theta for choice in here])
            moved = tau_of((depth_of(tau) + shift).clamp(MIN_DEPTH, MAX_DEPTH))
            yield layer, heads, HeadThresholds(torch.where(tau >= 1.0, 1.0, moved), theta)

    def _evaluator(self, layer: int) -> LayerEvaluator:
        if layer not in self._evaluators:
            device = compute_device()
            self._evaluators[layer] = LayerEvaluator(
                self._capture.load(layer, CALIBRATION).to(device),
                self._settings.longest,
                self._settings.block_q,
                self._settings.block_k,
                # A GPU computes them anew in no time, and has not room for all layers' of all
                # samples that are taken at once.
                cache_bytes=0 if device.type == "cuda" else None,
            )
        return self._evaluators[layer]


def meet(error_at: Callable[[float], float], tolerance: float) -> float:
    """Finds the shift of depth at which an error that falls with it equals the tolerance.

    By secants on log error while they stay inside the bracket, else by halving it.

    Returns:
        Of the shifts that were tried, the one whose error came nearest.
    """
    excess: dict[float, float] = {}
    low, high, shift, slope = -_MOST_SHIFT, _MOST_SHIFT, 0.0, START_SLOPE
    for _ in range(_MOST_STEPS):
        here = math.log(max(error_at(shift), 1e-12) / tolerance)
        if excess:
            before = next(reversed(excess))
            slope = max(_LEAST_SLOPE, (excess[before] - here) / (shift - before))
        excess[shift] = here
        if abs(here) <= CLOSE:
            break
        low, high = (shift, high) if here > 0.0 else (low, shift)
        guess = shift + here / slope
        shift = guess if low < guess < high else (low + high) / 2
    return min(excess, key=lambda tried: abs(excess[tried]))
