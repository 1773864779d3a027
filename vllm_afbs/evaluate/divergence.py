"""Divergences between next-token distributions of which only the likeliest tokens are known."""

import math
from collections.abc import Mapping, Sequence

SMALLEST_MASS = 2.0**-23
"""The rest's mass is 1 less a sum of float32 numbers: below this it is rounding error."""


def coarsen(
    p: Mapping[int, float], q: Mapping[int, float]
) -> tuple[dict[int | None, float], dict[int | None, float]]:
    """Makes two distributions comparable: the tokens both report, and the rest as one (None).

    A token that only one of them reports has no known probability in the other, so it goes into
    the rest. Merging outcomes never increases a divergence (data processing inequality), so the
    divergence of the results is a lower bound on that of the whole distributions.
    """
    shared = {token for token in p.keys() & q.keys() if p[token] > 0 and q[token] > 0}
    return _with_rest(p, shared), _with_rest(q, shared)


def _with_rest(p: Mapping[int, float], tokens: set[int]) -> dict[int | None, float]:
    kept: dict[int | None, float] = {token: p[token] for token in tokens}
    kept[None] = max(1.0 - math.fsum(kept.values()), SMALLEST_MASS)
    return kept


def kl_divergence(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """KL(p || q) in nats, after `coarsen`."""
    left, right = coarsen(p, q)
    return math.fsum(mass * math.log(mass / right[token]) for token, mass in left.items())


def total_variation(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Half the L1 distance, in [0, 1], after `coarsen`."""
    left, right = coarsen(p, q)
    return math.fsum(abs(mass - right[token]) for token, mass in left.items()) / 2


def agreement_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Counts the tokens that two sequences have in common from the start."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
