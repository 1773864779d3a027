"""Student's t distribution, of which a confidence bound needs one quantile."""

import math

_HALVINGS = 100


def t_cdf(t: float, freedom: int) -> float:
    """Probability of a value up to ``t >= 0``.

    Finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: The value.
        freedom: Degrees of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + within) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The value that is not exceeded with a probability, from 0.5 to below 1."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high
