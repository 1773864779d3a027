"""A layer's evaluators, and the count of what they were asked.

The definitions that every figure about the tuner rests on:

- *Evaluation*: one (head, tau, theta, lambda, length, rows) scored against dense, cached or not.
  A pass over H heads counts H. Reading a sparsity off the selection computes no attention and
  does not count.
- *Cost* of an evaluation: (length / longest)^2 x the share of the rows that is scored.
"""

from dataclasses import dataclass

import torch

from vllm_afbs.captures import Capture, LayerTensors
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.tuning.device import compute_device
from vllm_afbs.tuning.search.evaluator import HeadScores, LayerEvaluator, default_cache_bytes


@dataclass(frozen=True)
class SearchSettings:
    """What a search depends on besides the model and the text.

    Attributes:
        lengths: The fidelities: lengths in tokens, shortest first, at least two.
        tolerance: Largest relative L1 error of a head on the calibration text.
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        seed: Of everything random.
    """

    lengths: list[int]
    tolerance: float
    block_q: int
    block_k: int
    seed: int

    @property
    def longest(self) -> int:
        """The target fidelity, in tokens."""
        return self.lengths[-1]


class LayerScorer:
    """Evaluators of one layer, made when first needed.

    Args:
        settings: The job's settings.
        layer: Which layer.
        capture: Its Q, K and V.

    Attributes:
        held_out: Names of the held-out windows.
        evaluations: Heads scored since the last ``reset``.
        cost: Their cost.
    """

    def __init__(self, settings: SearchSettings, layer: int, capture: Capture) -> None:
        self.held_out = capture.held_out
        self.evaluations = 0
        self.cost = 0.0
        self._settings = settings
        self._layer = layer
        self._capture = capture
        self._tensors: dict[str, LayerTensors] = {}
        self._evaluators: dict[tuple[str, int, int | None], LayerEvaluator] = {}

    def reset(self) -> None:
        """Starts counting anew."""
        self.evaluations, self.cost = 0, 0.0

    def evaluator(self, window: str, length: int, q_blocks: int | None) -> LayerEvaluator:
        """The evaluator of a window's first ``length`` tokens.

        Args:
            window: ``CALIBRATION`` or one of ``held_out``.
            length: Tokens of context.
            q_blocks: Query blocks to score, spread over the context; None for all.
        """
        key = (window, length, q_blocks)
        if key not in self._evaluators:
            num_q_blocks = -(-length // self._settings.block_q)
            tensors = self._window(window)
            # All held-out windows are in use at once, so they share the memory.
            sharing = len(self.held_out) if window in self.held_out else 1
            self._evaluators[key] = LayerEvaluator(
                tensors,
                length,
                self._settings.block_q,
                self._settings.block_k,
                row_share=min(1.0, q_blocks / num_q_blocks) if q_blocks else 1.0,
                cache_bytes=default_cache_bytes(tensors.query.device) // sharing,
            )
        return self._evaluators[key]

    def _window(self, name: str) -> LayerTensors:
        if name not in self._tensors:
            self._tensors[name] = self._capture.load(self._layer, name).to(compute_device())
        return self._tensors[name]

    def score(
        self, evaluator: LayerEvaluator, thresholds: HeadThresholds, heads: torch.Tensor
    ) -> HeadScores:
        """Scores a layer in one pass; only the scores of ``heads`` are counted and valid."""
        if not heads.any():
            zeros = torch.zeros(len(heads), dtype=torch.float64)
            return HeadScores(zeros, zeros.clone())
        self.count(evaluator, int(heads.sum()))
        return evaluator.score(thresholds)

    def count(self, evaluator: LayerEvaluator, evaluations: int) -> None:
        """Adds evaluations made with an evaluator."""
        self.evaluations += evaluations
        share_of_longest = evaluator.length / self._settings.longest
        self.cost += evaluations * share_of_longest**2 * evaluator.row_share
