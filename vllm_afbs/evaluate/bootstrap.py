"""Confidence intervals of paired differences."""

from collections.abc import Sequence

import numpy as np

REPLICATES = 2000


def bootstrap_means(differences: Sequence[float], seed: int = 0) -> np.ndarray:
    """Takes the means of samples drawn with replacement (Efron's bootstrap).

    The samples are differences between paired answers, so a prompt that is hard for both models
    adds no noise.

    Args:
        differences: One difference for each prompt, window or segment of text.
        seed: Seed of the draws.

    Returns:
        ``[REPLICATES]``, fp64.
    """
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(REPLICATES, len(values)))
    means: np.ndarray = values[draws].mean(axis=1)
    return means


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """Returns the 2.5th and the 97.5th percentile: a 95 % confidence interval."""
    low, high = np.percentile(replicates, (2.5, 97.5))
    return float(low), float(high)
