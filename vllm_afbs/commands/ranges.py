"""Numbers of layers as people write them."""

from collections.abc import Sequence


def shortened(indices: Sequence[int]) -> str:
    """Writes sorted numbers with runs shortened: 0-3, 7."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
