"""Stage 1 of a layer's search: where each head's tau lies on short contexts.

Each head's tau, and how fast its error falls as tau grows, carry over from length to length, and at
last to the longest, where stage 2 begins. A short length takes few rows and few scores: nothing is
accepted here.
"""

import math
from collections.abc import Mapping

import torch

from vllm_afbs.captures import CALIBRATION
from vllm_afbs.tuning.search.bracket import CurveSearch, most_sparsity, score_at
from vllm_afbs.tuning.search.curve import Curve
from vllm_afbs.tuning.search.depth import MIN_DEPTH, START_SLOPE, depth_of
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

EXPLORE_Q_BLOCKS = 16
"""Query blocks scored while exploring, at every length: the number of rows is a fidelity, too.

Chosen on SmolLM2-135M at lengths to 8192 and a tolerance of 0.05.
"""
STEPS = 2
"""Scores at the shortest length: the fewest that show a slope, which holds for any model. Further
lengths begin with that slope and take one."""
START_TAU = 0.93
"""Where the first length of every layer begins; chosen on SmolLM2-135M.

To start where the layer before ended saves nothing (two samples of SmolLM2-135M: 11.0 and 12.5
evaluations a head, against 11.2 and 12.2), and would make layers depend on each other.
"""
_NEARNESS = 0.3
"""How far in log error a head may end from the tolerance. Over that distance, log error of
SmolLM2-135M's heads is a line in depth."""
_HARD_DEPTH = 6.0
"""Where a head begins that would run dense at the length before. It is between ``START_TAU``'s
depth (2.7) and ``MAX_DEPTH``; chosen on SmolLM2-135M."""
_DAMPING = 0.7
"""Depth grows by less from each length to the next; chosen on SmolLM2-135M at lengths to 8192."""


def explore(
    settings: SearchSettings, scorer: LayerScorer, length: int, shorter: Mapping[int, Curve]
) -> Curve:
    """Searches every head's tau roughly at a length.

    Args:
        settings: The job's settings.
        scorer: The layer's evaluators.
        length: Tokens of context.
        shorter: The curves of the shorter lengths, shortest first.
    """
    evaluator = scorer.evaluator(CALIBRATION, length, EXPLORE_Q_BLOCKS)
    start, slope = begin(settings, evaluator.num_heads, length, shorter)
    search = CurveSearch([settings.tolerance], start, slope, most_sparsity(evaluator), _NEARNESS)
    curve = search.run(lambda tau: score_at(evaluator, tau), 1 if shorter else STEPS)
    scorer.count(evaluator, search.evaluations)
    return curve


def begin(
    settings: SearchSettings, num_heads: int, length: int, shorter: Mapping[int, Curve]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to begin at a length: depth, extrapolated from shorter ones on a log scale, and slope.

    Args:
        settings: The job's settings.
        num_heads: Query heads of the layer.
        length: Tokens of context.
        shorter: The curves of the shorter lengths, shortest first.
    """
    if not shorter:
        tau = torch.full((num_heads,), START_TAU, dtype=torch.float64)
        return depth_of(tau), torch.full_like(tau, START_SLOPE)
    lengths = list(shorter)
    depths = [
        curve.estimate(settings.tolerance).clamp(MIN_DEPTH, _HARD_DEPTH)
        for curve in shorter.values()
    ]
    slope = shorter[lengths[0]].slope()
    if len(lengths) == 1:
        return depths[-1], slope
    ratio = math.log(length / lengths[-1]) / math.log(lengths[-1] / lengths[-2])
    growth = (depths[-1] - depths[-2]).clamp_min(0.0)
    return depths[-1] + _DAMPING * ratio * growth, slope
