"""Compares sparse answers with dense ones, pair by pair."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch

from vllm_afbs.evaluate.bootstrap import bootstrap_means, interval
from vllm_afbs.evaluate.divergence import agreement_length, kl_divergence
from vllm_afbs.evaluate.predictor import NextToken
from vllm_afbs.evaluate.retrieval import WITHOUT_DEPTH
from vllm_afbs.evaluate.suite import Answers, Suite

SEGMENT = 256
"""Tokens whose losses count as one sample of perplexity: neighbours depend on each other."""
PERPLEXITY, LOSS, KL, KL_TOP = "perplexity", "next-token loss", "KL to dense", "KL to dense, top 20"
AGREEMENT, RETRIEVAL = "greedy agreement", "retrieval"


@dataclass(frozen=True)
class Comparison:
    """One figure of the sparse model beside the dense one's.

    Attributes:
        test: Name of the test.
        part: Part of the test, for instance a range of positions.
        unit: Unit of ``dense`` and ``sparse``.
        dense: The dense model's mean, or its perplexity.
        sparse: The sparse model's.
        change: ``sparse - dense``; for perplexity ``sparse / dense``.
        low: Lower end of the 95 % confidence interval of ``change``.
        high: Upper end of the interval.
        samples: Number of pairs.
        worse: Whether a larger change is worse.
    """

    test: str
    part: str
    unit: str
    dense: float
    sparse: float
    change: float
    low: float
    high: float
    samples: int
    worse: bool

    @property
    def is_significant(self) -> bool:
        """Whether the whole interval lies on the worse side of no change."""
        neutral = 1.0 if self.test == PERPLEXITY else 0.0
        return self.low > neutral if self.worse else self.high < neutral


def compare(suite: Suite, dense: Answers, sparse: Answers) -> list[Comparison]:
    """Computes all figures of a suite that both models answered."""
    return [
        *_perplexities(dense.losses, sparse.losses),
        *_next_tokens(dense.next_tokens, sparse.next_tokens),
        *_agreements(suite, dense, sparse),
        *_retrievals(suite, dense, sparse),
    ]


def buckets(length: int) -> list[tuple[int, int]]:
    """Divides positions at 2048, 4096, 8192 and so on, up to the length."""
    edges = [1]
    edge = 2048
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(pairwise([*edges, length]))


def _perplexities(
    dense: Sequence[torch.Tensor], sparse: Sequence[torch.Tensor]
) -> Iterator[Comparison]:
    if not dense:
        return
    length = len(dense[0]) + 1
    parts = {f"positions {low} to {high}": (low, high) for low, high in buckets(length)}
    parts["all positions"] = (1, length)
    for part, (low, high) in parts.items():
        # The loss of the token at position p is entry p - 1.
        pairs = [
            (float(a.double().mean()), float(b.double().mean()))
            for one, other in zip(dense, sparse, strict=True)
            for a, b in zip(
                _segments(one[low - 1 : high - 1]),
                _segments(other[low - 1 : high - 1]),
                strict=True,
            )
        ]
        yield _of_pairs(PERPLEXITY, part, "perplexity", pairs, math.exp, worse=True)


def _segments(losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cuts losses into equal parts of about ``SEGMENT`` tokens."""
    return losses.tensor_split(max(1, len(losses) // SEGMENT))


def _next_tokens(dense: Sequence[NextToken], sparse: Sequence[NextToken]) -> Iterator[Comparison]:
    if not dense:
        return
    pairs = list(zip(dense, sparse, strict=True))
    losses = [(one.loss, other.loss) for one, other in pairs]
    yield _of_pairs(LOSS, "truncated prefixes", "nats", losses, worse=True)
    whole = [
        float((p.exp() * (p - q)).sum(dtype=torch.float64))
        for p, q in ((one.log_probs, other.log_probs) for one, other in pairs)
        if p is not None and q is not None
    ]
    if whole:
        yield _from_zero(KL, "truncated prefixes", "nats", whole)
    top = [kl_divergence(one.top, other.top) for one, other in pairs]
    yield _from_zero(KL_TOP, "truncated prefixes", "nats, a lower bound", top)


def _agreements(suite: Suite, dense: Answers, sparse: Answers) -> Iterator[Comparison]:
    if not suite.continued:
        return
    lengths = [
        (float(suite.new_tokens), float(_agreement(one, other, suite.new_tokens)))
        for one, other in zip(dense.continuations, sparse.continuations, strict=True)
    ]
    yield _of_pairs(AGREEMENT, "continuations", "tokens", lengths, worse=False)


def _agreement(one: list[int], other: list[int], room: int) -> int:
    return room if one == other else agreement_length(one, other)


def _retrievals(suite: Suite, dense: Answers, sparse: Answers) -> Iterator[Comparison]:
    kinds: dict[str, list[tuple[float, float]]] = {}
    for prompt, pair in zip(
        suite.retrieval, zip(dense.retrieved, sparse.retrieved, strict=True), strict=True
    ):
        points = 100 * pair[0], 100 * pair[1]
        kinds.setdefault(prompt.task, []).append(points)
        if prompt.task not in WITHOUT_DEPTH:
            kinds.setdefault(f"depth {round(100 * prompt.depth)} %", []).append(points)
        kinds.setdefault("all kinds", []).append(points)
    for kind, pairs in kinds.items():
        yield _of_pairs(RETRIEVAL, kind, "points", pairs, worse=False)


def _of_pairs(
    test: str,
    part: str,
    unit: str,
    pairs: Sequence[tuple[float, float]],
    scale: Callable[[float], float] = float,
    *,
    worse: bool,
) -> Comparison:
    dense, sparse = (fmean(side) for side in zip(*pairs, strict=True))
    low, high = interval(bootstrap_means([b - a for a, b in pairs]))
    return Comparison(
        test, part, unit, scale(dense), scale(sparse), scale(sparse - dense), scale(low),
        scale(high), len(pairs), worse,
    )  # fmt: skip


def _from_zero(test: str, part: str, unit: str, values: Sequence[float]) -> Comparison:
    """Makes the figure of a divergence, which is 0 for the dense model itself."""
    return _of_pairs(test, part, unit, [(0.0, value) for value in values], worse=True)


def worst(comparisons: Sequence[Comparison]) -> Comparison | None:
    """Finds the retrieval task that loses the most; None if there was no retrieval.

    Depths group the same prompts in another way, so only tasks are compared.
    """
    tasks = [
        each
        for each in comparisons
        if each.test == RETRIEVAL and not each.part.startswith(("depth ", "all "))
    ]
    return min(tasks, key=lambda each: each.change, default=None)
