"""Confidence intervals of paired differences."""

from collections.abc import Sequence

import numpy as np

REPLICATES = 2000


def bootstrap_means(differences: Sequence[float], seed: int = 0) -> np.ndarray:
    """Means of samples drawn again with replacement (Efron's bootstrap).

    The samples are differences of pairs, so what makes a prompt hard for both is not counted as
    noise.

    Args:
        differences: One of each prompt, window or segment of text.
        seed: Of the drawing.

    Returns:
        ``[REPLICATES]``, fp64.
    """
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(REPLICATES, len(values)))
    means: np.ndarray = values[draws].mean(axis=1)
    return means


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(replicates, (2.5, 97.5))
    return float(low), float(high)
