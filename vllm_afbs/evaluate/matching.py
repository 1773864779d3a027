"""Bringing methods to one sparsity: the knob that leaves it on a text's windows.

No bisection is needed, since every block's level is known: the knob is a quantile of the levels
over the whole model. They are taken from a dense run first, and then from a run with the knob that
this gave, because layers see different inputs once those before them are sparse.
"""

import math
from collections.abc import Sequence

import torch

from vllm_afbs.evaluate.in_process import Runner
from vllm_afbs.evaluate.methods import Method, Selection

_LEAST = float(torch.finfo(torch.float64).min)


def knob_at(levels: Sequence[torch.Tensor], sparsity: float) -> float:
    """The knob under which a share of 1 - ``sparsity`` of all levels lies.

    Args:
        levels: Of all visible blocks, by layer.
        sparsity: Wanted; the nearest that the method reaches counts.
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
    """Sets a method's knob for a sparsity over the whole model.

    Args:
        runner: The model.
        windows: Token ids of the texts' windows.
        method: What to set.
        dense: Its levels from a dense run over them.
        sparsity: Wanted.
    """
    first = Selection(method, knob_at(dense, sparsity))
    (again,) = runner.levels(windows, [method], first)
    return Selection(method, knob_at(again, sparsity))
