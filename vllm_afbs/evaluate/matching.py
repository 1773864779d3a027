"""Sets a method's knob so that the whole model reaches a given sparsity.

Every block's level is known, so no bisection is needed: the knob is a quantile of the levels over
the whole model. The levels are taken from a dense run first. They are then taken again from a run
with that knob, because a layer sees other inputs once the layers before it are sparse.
"""

import math
from collections.abc import Sequence

import torch

from vllm_afbs.evaluate.in_process import Runner
from vllm_afbs.evaluate.methods import Method, Selection

_LEAST = float(torch.finfo(torch.float64).min)


def knob_at(levels: Sequence[torch.Tensor], sparsity: float) -> float:
    """Finds the knob that lies above a share of 1 - ``sparsity`` of all levels.

    Args:
        levels: Levels of all visible blocks, by layer.
        sparsity: The wanted sparsity; the nearest one that the method can reach is taken.
    """
    ordered = torch.cat([each.flatten() for each in levels]).sort().values
    kept = round((1.0 - sparsity) * len(ordered))
    inside, outside = (float(ordered[min(max(i, 0), len(ordered) - 1)]) for i in (kept - 1, kept))
    if inside == outside or not (math.isfinite(inside) and math.isfinite(outside)):
        return max(outside, _LEAST)
    return (inside + outside) / 2


def settle(
    runner: Runner,
    windows: Sequence[Sequence[int]],
    method: Method,
    dense: Sequence[torch.Tensor],
    sparsity: float,
) -> Selection:
    """Sets a method's knob so that the whole model reaches a sparsity.

    Args:
        runner: The model.
        windows: Token ids of the texts' windows.
        method: The method to set.
        dense: The method's levels from a dense run over the windows.
        sparsity: The wanted sparsity.
    """
    first = Selection(method, knob_at(dense, sparsity))
    (again,) = runner.levels(windows, [method], first)
    return Selection(method, knob_at(again, sparsity))
