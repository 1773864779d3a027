"""Fronts of two objectives that are both to be small: predicted time and divergence."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """What a division of the error costs and gains.

    Attributes:
        time_ratio: Predicted time of attention over that of dense attention.
        kl: Mean KL divergence from the dense model's predictions, in nats.
    """

    time_ratio: float
    kl: float


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats in both objectives, slowest first."""
    order = sorted(range(len(points)), key=lambda i: (points[i].time_ratio, points[i].kl))
    found: list[int] = []
    for index in order:
        if not found or points[index].kl < points[found[-1]].kl:
            found.append(index)
    return found[::-1]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area that a front leaves below a reference, divergence on a log scale.

    Args:
        points: Any points; those that the reference does not exceed in both count for nothing.
        reference: The worst of both objectives.
    """
    better = [p for p in points if p.time_ratio < reference.time_ratio and p.kl < reference.kl]
    area, end = 0.0, math.log(reference.kl)
    for point in (better[index] for index in reversed(front(better))):  # fastest first
        kl = math.log(max(point.kl, 1e-12))
        area += (reference.time_ratio - point.time_ratio) * max(0.0, end - kl)
        end = min(end, kl)
    return area


def ascending(points: Sequence[Point], keep: int) -> list[int]:
    """Indices of points of which each is faster and diverges more than the one before.

    Args:
        points: The points.
        keep: Index of one that stays, whatever the others are; they are dropped on its account.

    Returns:
        The indices, slowest first.
    """
    order = sorted(range(len(points)), key=lambda i: -points[i].time_ratio)
    place = order.index(keep)
    slower, faster = [keep], [keep]
    for index in reversed(order[:place]):
        last = points[slower[-1]]
        if points[index].time_ratio > last.time_ratio and points[index].kl < last.kl:
            slower.append(index)
    for index in order[place + 1 :]:
        last = points[faster[-1]]
        if points[index].time_ratio < last.time_ratio and points[index].kl > last.kl:
            faster.append(index)
    return [*slower[::-1], *faster[1:]]


def spread(points: Sequence[Point], count: int) -> list[int]:
    """Indices of at most ``count`` points that are spread evenly in the log of divergence.

    Args:
        points: Points in order of divergence.
        count: Most points, at least two; the first and the last are among them.
    """
    if len(points) <= count:
        return list(range(len(points)))
    logs = [math.log(max(point.kl, 1e-12)) for point in points]
    chosen = [0, len(points) - 1]
    for step in range(1, count - 1):
        wanted = logs[0] + (logs[-1] - logs[0]) * step / (count - 1)
        free = [index for index in range(len(points)) if index not in chosen]
        chosen.append(min(free, key=lambda index: abs(logs[index] - wanted)))
    return sorted(chosen)
