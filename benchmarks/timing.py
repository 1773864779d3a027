"""Times functions in turns, so that drift of the machine hits all of them alike."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

from vllm_afbs.commands.results import Row, make_row

_Name = TypeVar("_Name", bound=Hashable)


def time_in_turns(
    functions: Mapping[_Name, Callable[[], object]], rounds: int
) -> dict[_Name, list[float]]:
    """Times functions one after another, round by round, so that drift hits all alike.

    On a GPU, the device's time between two events is taken, with a cleared cache. The host gets a
    lead of a millisecond, as it has in a model from the matrix products, so that the kernels are
    timed and not the speed at which Python launches them.

    Args:
        functions: Functions by name; each is called once before the first round.
        rounds: Timed calls of each function.

    Returns:
        The seconds of all timed calls, by name.
    """
    time_call = _device_seconds if torch.cuda.is_available() else _host_seconds
    for function in functions.values():
        function()
    seconds: dict[_Name, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(time_call(function))
    return seconds


def _host_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


_LEAD_CYCLES = 2_000_000


def _device_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    torch.cuda._sleep(_LEAD_CYCLES)
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def ratio_row(what: str, shape: str, baseline: Sequence[float], own: Sequence[float]) -> Row:
    """Makes a row of how many times faster than the baseline each round was."""
    ratios = [slow / fast for slow, fast in zip(baseline, own, strict=True)]
    return make_row(what, shape, ratios, "ratio")
