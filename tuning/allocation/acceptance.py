"""Accepting an increase of perplexity on windows that the search has not seen.

The held-out windows steer the search, so what it chose looks better on them than it is. The
acceptance windows only answer yes or no. The samples are the differences in mean loss, sparse less
dense, of equal blocks of tokens: whole windows if there are enough of them, else parts of windows.
Dense and sparse losses of a block are paired, so a text that is hard for both adds no noise. The
bound is Student's one-sided bound of the samples' mean. It assumes that

- blocks are independent, and their mean is nearly normal. Parts of one window share their text, so
  more windows make a better bound;
- what is served resembles the texts.

A refused candidate is followed by one with less damage. The candidates follow from the other
windows alone, and at most ``CANDIDATES`` are tried, each at an equal part of the error probability
(Bonferroni). So the chance that an accepted profile is worse than its bound stays below
1 - ``CONFIDENCE`` for all candidates together.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.tuner_run import Acceptance, TextPart
from vllm_afbs.tuning.allocation.student import t_quantile
from vllm_afbs.tuning.engine import SparseModel
from vllm_afbs.tuning.journal import Journal, Result
from vllm_afbs.tuning.progress import Progress
from vllm_afbs.tuning.windows import Part

CONFIDENCE = 0.95
LEAST_BLOCKS = 8
"""Fewest samples: with two or three, Student's bound would be several times the estimate."""
CANDIDATES = 3
"""Most candidates that are tried; each after the first tunes all layers again."""
BACK_OFF = 0.5
"""A candidate's budget of damage over that of the one before."""


@dataclass(frozen=True, eq=False)
class BlockLosses(Result):
    """Mean loss of every block of the acceptance windows, in nats, window by window."""

    losses: tuple[float, ...]


@dataclass(frozen=True)
class Increase:
    """An increase of perplexity, as a ratio.

    Attributes:
        measured: Its estimate.
        bound: Its upper confidence bound.
    """

    measured: float
    bound: float


def increase_of(dense: Sequence[float], sparse: Sequence[float]) -> Increase:
    """The increase of perplexity, and its bound for one of ``CANDIDATES`` candidates.

    Args:
        dense: Mean loss of each block, at least two, in nats.
        sparse: The same blocks' with the sparse model.
    """
    differences = [b - a for a, b in zip(dense, sparse, strict=True)]
    count, mean = len(differences), fmean(differences)
    quantile = t_quantile(1 - (1 - CONFIDENCE) / CANDIDATES, count - 1)
    margin = quantile * stdev(differences) / math.sqrt(count)
    return Increase(math.expm1(mean), math.expm1(mean + margin))


def describe(acceptance: Acceptance) -> str:
    """What was accepted, for people."""
    counts = Counter(window.text for window in acceptance.windows)
    where = ", ".join(f"{count} of {text}" for text, count in counts.items())
    return (
        f"perplexity grows by {acceptance.increase:.2%}, by at most {acceptance.bound:.2%} with "
        f"{acceptance.confidence:.0%} confidence, on windows that the search had not seen "
        f"({where}; {acceptance.num_blocks} blocks)"
    )


class AcceptanceTest:
    """Measures candidates on the acceptance windows.

    Args:
        windows: The acceptance windows, at least one.
        journal: Where losses are kept.
        progress: Is told how far a measurement is.
    """

    def __init__(self, windows: Sequence[Part], journal: Journal, progress: Progress) -> None:
        self._windows = windows
        self._journal = journal
        self._progress = progress
        num_losses = len(windows[0].tokens) - 1
        self._per_window = min(-(-LEAST_BLOCKS // len(windows)), num_losses)

    def increase(
        self, name: str, model: SparseModel, thresholds: Mapping[int, HeadThresholds]
    ) -> Increase:
        """Measures, or replays, a candidate.

        Args:
            name: Name of the candidate in the journal.
            model: The model.
            thresholds: Those of the candidate's sparse layers, by the layer's index.
        """
        dense = self._losses("acceptance dense", model, {})
        return increase_of(dense, self._losses(f"acceptance {name}", model, thresholds))

    def record(self, increase: Increase, candidate: int) -> Acceptance:
        """What the profile says of an accepted candidate, counted from 1."""
        return Acceptance(
            increase=increase.measured,
            bound=increase.bound,
            confidence=CONFIDENCE,
            candidate=candidate,
            num_blocks=self._per_window * len(self._windows),
            windows=[
                TextPart(text=part.text, start=part.start, num_tokens=part.num_tokens)
                for part in self._windows
            ],
        )

    def _losses(
        self, step: str, model: SparseModel, thresholds: Mapping[int, HeadThresholds]
    ) -> tuple[float, ...]:
        def measure() -> BlockLosses:
            self._progress.begin(f"Accepting ({step})", len(self._windows))
            found: list[float] = []
            for part in self._windows:
                blocks = model.losses(part.tokens, thresholds).tensor_split(self._per_window)
                found += [float(block.double().mean()) for block in blocks]
                self._progress.advance(1.0)
            return BlockLosses(tuple(found))

        return self._journal.step(step, BlockLosses, measure).losses
