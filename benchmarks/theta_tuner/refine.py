"""Stage 2 of a layer's search: each head's tau again, with more query rows, at the longest length.

The search begins at the tau and slope of stage 1 and accepts only what it has measured within the
tolerance. Then tau is raised for as long as the same blocks are dropped.
"""

import torch

from benchmarks.theta_tuner.bracket import AtTheta, TauSearch
from benchmarks.theta_tuner.explore import best_of
from benchmarks.theta_tuner.results import Candidate, Explored, Refined
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.kernels import THETA_OFF
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

REFINE_Q_BLOCKS = 32
"""Query blocks scored while refining; chosen on SmolLM2-135M at lengths to 8192."""
REFINE_STEPS = 9
"""Scores of a head at most.

Enough for heads whose error falls in steps. With five, one of 45 heads of SmolLM2-135M stayed dense
that some tau accepts, which cost 0.015 of the mean sparsity at equal error.
"""


def refine(settings: SearchSettings, scorer: LayerScorer, explored: Explored) -> Refined:
    """Searches tau again; a head that stage 1 gave a theta keeps it only if it gains here, too.

    Stage 1 takes the best of several rough readings. On SmolLM2-135M (8192 tokens, tolerance 0.05)
    one in ten of the gains that it reads remains when all rows are scored, and without the others
    held-out text skips more.
    """
    refined = refine_tau(settings, scorer, explored.best)
    has_theta = explored.best.theta > THETA_OFF
    if not has_theta.any():
        return refined
    without = refine_tau(settings, scorer, explored.without_theta, has_theta)
    return best_of(without, [refined])


def refine_tau(
    settings: SearchSettings,
    scorer: LayerScorer,
    start: Candidate,
    heads: torch.Tensor | None = None,
) -> Refined:
    """Searches the tau of the heads that are expected to skip enough.

    Args:
        settings: The settings; the tolerance may be the layer's own.
        scorer: The layer's evaluators.
        start: Where to begin; theta stays as it is there.
        heads: Heads to search, ``[num_heads]`` bool; None for all. The others come out dense.
    """
    evaluator = scorer.evaluator(CALIBRATION, settings.longest, REFINE_Q_BLOCKS)
    layer, worth = AtTheta(evaluator, start.theta), start.sparsity >= MIN_SPARSITY
    if heads is not None:
        worth &= heads
    search = TauSearch(settings.tolerance, start.tau, worth, start.slope, most=layer.most)
    best = search.run(layer.score, max_steps=REFINE_STEPS)
    scorer.count(evaluator, search.evaluations)
    tau = layer.raised(best.tau)
    return Refined(start.theta, tau, search.slope, best.sparsity, error=best.error)
