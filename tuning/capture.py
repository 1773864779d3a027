"""Takes a job's capture: which windows are missing, whether they fit, and that they are complete.

The engine runs only the decoder's body, once per window at the longest length. A job that was
stopped does not run the model again for the windows that it has.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_afbs.captures import CALIBRATION, Capture, HeadCounts, check_space
from vllm_afbs.errors import InputError
from vllm_afbs.tuning.engine import Engine, Model


def capture(
    model: Model,
    engine: Engine,
    windows: Mapping[str, list[int]],
    layers: Sequence[int],
    directory: Path,
    on_progress: Callable[[float], None],
) -> Capture:
    """Runs the model over each window and keeps the layers' Q, K and V.

    Args:
        model: The model.
        engine: Runs it.
        windows: Token ids from ``windows.cut_windows``.
        layers: Which layers to keep.
        directory: Folder to keep captures in; one made of the same weights and tokens is reused.
        on_progress: Called with 1 after each layer in each window.

    Raises:
        InputError: The weights cannot be read, or a layer's attention is not supported.
        OSError: The disk is full.
    """
    digest = hashlib.sha256(model.digest().encode())
    digest.update(repr(sorted(windows.items())).encode())
    shape = model.fingerprint
    held_out = tuple(window for window in windows if window != CALIBRATION)
    taken = Capture(directory / f"capture-{digest.hexdigest()[:16]}", tuple(layers), held_out)
    todo = taken.missing()
    for _ in range(len(layers) * (len(windows) - len(todo))):
        on_progress(1.0)
    if not todo:
        return taken
    taken.directory.mkdir(exist_ok=True)
    counts = HeadCounts(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    # A layer that is there already is written again beside the old file before it replaces it.
    num_rows = sum(len(windows[window]) * count for window, count in todo.items())
    num_rows += max(len(windows[window]) for window in todo)
    check_space(taken.directory, num_rows * counts.row_bytes)
    engine.capture({window: windows[window] for window in todo}, taken, on_progress)
    if lacking := taken.missing():
        window, count = next(iter(lacking.items()))
        raise InputError(
            f"{model.name}: attention of {len(layers)} layers expected, {len(layers) - count} were "
            f"captured over the window {window}"
        )
    return taken
