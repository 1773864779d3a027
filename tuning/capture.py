"""Capturing each layer's Q, K and V, after the rotary embedding, from the real model.

Only the decoder's body runs, once per window at the longest length, on a GPU if there is one.
Attention is causal, so the tensors of a shorter context are a prefix. They are kept in bf16, as in
the server's cache, with one file per layer and window. A job that was stopped does not run the
model again for the windows it has.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.tuning import attention, memory
from vllm_afbs.tuning.attention import AttentionCall
from vllm_afbs.tuning.errors import InputError, one_line
from vllm_afbs.tuning.model.source import SourceModel
from vllm_afbs.tuning.model.weights import load_weights
from vllm_afbs.tuning.windows import CALIBRATION

ATTENTION = "afbs_capture"
"""Name of the recorded attention function among transformers'."""


@dataclass(frozen=True)
class LayerTensors:
    """One layer's attention inputs over one window of text.

    Attributes:
        query: ``[length, num_heads, head_dim]``, bf16.
        key: ``[length, num_kv_heads, head_dim]``, bf16.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
        sink: A logit of each query head that takes part in every row's softmax and has no value,
            ``[num_heads]``, fp32; None for none.
        softcap: Bounds the scaled scores: ``softcap * tanh(scores / softcap)``; 0 for none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax_scale: float
    sink: torch.Tensor | None = None
    softcap: float = 0.0

    def to(self, device: torch.device) -> "LayerTensors":
        """The same tensors on a device."""
        query, key, value = (each.to(device) for each in (self.query, self.key, self.value))
        sink = None if self.sink is None else self.sink.to(device)
        return replace(self, query=query, key=key, value=value, sink=sink)


@dataclass(frozen=True)
class Capture:
    """The captured tensors, on disk.

    Attributes:
        directory: Holds one safetensors file per layer and window.
        layers: The layers that are kept.
        held_out: Names of the held-out windows; the other one is ``CALIBRATION``.
    """

    directory: Path
    layers: tuple[int, ...]
    held_out: tuple[str, ...]

    def load(self, layer: int, window: str) -> LayerTensors:
        """Reads one layer's tensors over one window.

        Raises:
            InputError: The file is missing or damaged.
        """
        path = self.path(layer, window)
        try:
            with safe_open(path, framework="pt") as file:
                scale = float(file.metadata()["softmax_scale"])
                query, key, value = (file.get_tensor(name) for name in ("query", "key", "value"))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot read the capture: {one_line(error)}") from None
        return LayerTensors(query, key, value, scale)

    def path(self, layer: int, window: str) -> Path:
        """Where one layer's tensors over one window are kept."""
        return self.directory / f"layer-{layer:03d}.{window}.safetensors"

    def missing(self) -> dict[str, int]:
        """The windows that are not captured completely, and how many layers each lacks."""
        lacking = {
            window: sum(not self.path(layer, window).is_file() for layer in self.layers)
            for window in (CALIBRATION, *self.held_out)
        }
        return {window: count for window, count in lacking.items() if count}


def capture(
    model: SourceModel,
    windows: dict[str, list[int]],
    layers: Sequence[int],
    directory: Path,
    on_progress: Callable[[float], None],
) -> Capture:
    """Runs the model over each window and keeps the layers' Q, K and V.

    Args:
        model: The model.
        windows: Token ids from ``windows.cut_windows``.
        layers: Which layers to keep.
        directory: Folder to keep captures in; one made of the same weights and tokens is reused.
        on_progress: Called with 1 after each layer of the model in each window.

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
    for _ in range(shape.num_layers * (len(windows) - len(todo))):
        on_progress(1.0)
    if not todo:
        return taken
    taken.directory.mkdir(exist_ok=True)
    # A layer that is there already is written again beside the old file before it replaces it.
    num_rows = sum(len(windows[window]) * count for window, count in todo.items())
    _check_space(model, taken, num_rows + max(len(windows[window]) for window in todo))
    attention.register(ATTENTION, _no_recorder)
    body = load_weights(model, ATTENTION, with_head=False)
    for window in todo:
        recorder = Recorder(taken, shape, window, on_progress)
        try:
            with memory.explained(
                f"running the model over {len(windows[window])} tokens",
                "shorter --lengths expected, or a machine with more memory",
            ):
                recorder.run(body, windows[window])
        except InputError as error:
            raise InputError(f"{model.name}: {error}") from None
        if recorder.layers != list(range(shape.num_layers)):
            raise InputError(
                f"{model.name}: attention of {shape.num_layers} layers expected, "
                f"seen for {len(recorder.layers)}"
            )
    return taken


def _check_space(model: SourceModel, taken: Capture, num_rows: int) -> None:
    """Refuses to begin if ``num_rows`` tokens of single layers do not fit on the disk."""
    shape = model.fingerprint
    heads = shape.num_heads + 2 * shape.num_kv_heads
    needed_bytes = heads * shape.head_dim * 2 * num_rows
    free_bytes = shutil.disk_usage(taken.directory).free
    if free_bytes < needed_bytes:
        raise InputError(
            f"{taken.directory}: {needed_bytes / 1e9:.1f} GB expected for captured tensors, "
            f"{free_bytes / 1e9:.1f} GB free"
        )


class Recorder:
    """The attention function of one run over one window.

    Args:
        taken: Where the layers' tensors go.
        shape: What every layer has to have.
        window: Which window of them this is.
        on_progress: Called with 1 after each layer.

    Attributes:
        layers: Indices of the layers seen, in order.
    """

    def __init__(
        self,
        taken: Capture,
        shape: ModelFingerprint,
        window: str,
        on_progress: Callable[[float], None],
    ) -> None:
        self.layers: list[int] = []
        self._taken = taken
        self._shape = shape
        self._window = window
        self._on_progress = on_progress
        self._own_error: Exception | None = None

    def run(self, body: torch.nn.Module, tokens: Sequence[int]) -> None:
        """Runs a body whose attention is named ``ATTENTION`` over a window's token ids.

        Raises:
            InputError: The model cannot run them, or its attention is not supported.
            OSError: The disk is full.
        """
        vocabulary = body.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if max(tokens) >= vocabulary:
            raise InputError(
                f"vocab_size: above {max(tokens)} expected, a token of its tokenizer, "
                f"got {vocabulary}"
            )
        attention.register(ATTENTION, self._attend)
        try:
            with torch.inference_mode():
                device = next(body.parameters()).device
                body(input_ids=torch.tensor([tokens], device=device), use_cache=False)
        except Exception as error:
            if error is self._own_error or memory.exhausted(error):
                raise
            # What a configuration says wrongly may show only where its layers are run.
            raise InputError(
                f"transformers cannot run what config.json describes: {one_line(error)}"
            ) from None
        finally:
            attention.register(ATTENTION, _no_recorder)

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        try:
            self._check(call)
            if call.layer in self._taken.layers:
                self._save(call)
            self.layers.append(call.layer)
            self._on_progress(1.0)
        except Exception as error:
            self._own_error = error
            raise
        return call.dense()

    def _check(self, call: AttentionCall) -> None:
        """Refuses a layer whose attention is not what the fingerprint and a profile describe."""
        layer = f"layer {call.layer}"
        if call.variants:
            raise InputError(f"{layer}: {call.variants[0]}: plain causal attention expected")
        shape = self._shape
        for name, tensor, heads in (
            ("query", call.query, shape.num_heads),
            ("key", call.key, shape.num_kv_heads),
            ("value", call.value, shape.num_kv_heads),
        ):
            found = tensor.shape[1], tensor.shape[3]
            if found != (heads, shape.head_dim):
                raise InputError(
                    f"{layer}: {heads} {name} heads of {shape.head_dim} expected by config.json, "
                    f"got {found[0]} of {found[1]}"
                )
            finite = tensor.isfinite().all(dim=-1).all(dim=-1).all(dim=0)
            if not finite.all():
                head = int(finite.int().argmin())
                raise InputError(
                    f"{layer}, head {head}: {name} is not finite: the weights or config.json's "
                    "numbers cannot be right"
                )

    def _save(self, call: AttentionCall) -> None:
        path = self._taken.path(call.layer, self._window)
        tensors = {
            name: rows.to(torch.bfloat16).cpu().contiguous()
            for name, rows in zip(("query", "key", "value"), call.rows(), strict=True)
        }
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"softmax_scale": repr(call.softmax_scale)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot write the capture: {one_line(error)}") from None
        partial.replace(path)


def _no_recorder(_: AttentionCall) -> torch.Tensor:
    raise RuntimeError("the captured model runs only under a recorder")
