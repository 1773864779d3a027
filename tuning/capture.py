"""Capturing each layer's Q, K and V, after the rotary embedding, from the real model.

Only the decoder's body runs, once per window at the longest length (on a GPU when there is one):
attention is causal, so a shorter context's tensors are a prefix. They are kept in bf16, as the
server's cache keeps them, one file per layer and window, so a tuner that is stopped does not have
to run the model again.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_afbs.tuning.model import InputError, SourceModel, one_line
from vllm_afbs.tuning.weights import load_weights

WINDOWS = ("calibration", "validation")
ATTENTION = "afbs_capture"
"""Name of the recorded attention function among transformers'."""
# Attention variants that a transformers model hands to its attention function when it has them.
_VARIANTS = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class LayerTensors:
    """One layer's attention inputs over one window of text.

    Attributes:
        query: ``[length, num_heads, head_dim]``, bf16.
        key: ``[length, num_kv_heads, head_dim]``, bf16.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax_scale: float

    def to(self, device: torch.device) -> "LayerTensors":
        """The same on a device."""
        query, key, value = (each.to(device) for each in (self.query, self.key, self.value))
        return LayerTensors(query, key, value, self.softmax_scale)


@dataclass(frozen=True)
class Capture:
    """The captured tensors of every layer, on disk.

    Attributes:
        directory: Holds one safetensors file per layer and window.
        num_layers: Layers of the model.
    """

    directory: Path
    num_layers: int

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

    def missing(self) -> list[str]:
        """The windows that are not captured completely."""
        return [
            window
            for window in WINDOWS
            if not all(self.path(layer, window).is_file() for layer in range(self.num_layers))
        ]


def cut_windows(model: SourceModel, text: str, source: str, length: int) -> dict[str, list[int]]:
    """Cuts two disjoint windows of ``length`` tokens, from the text's start and from its middle.

    Args:
        model: The model, for its tokenizer.
        text: The calibration text.
        source: Where the text came from, for the message.
        length: Tokens of a window, the tokenizer's own first token (if it adds one) included.

    Returns:
        Token ids of each of ``WINDOWS``.

    Raises:
        InputError: The tokenizer cannot be read, or the text is too short.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.directory(), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{model.name}: cannot read the tokenizer: {one_line(error)}") from None
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    first = tokenizer("").input_ids
    prefix = first[:1] if first and first[0] == tokenizer.bos_token_id else []
    length -= len(prefix)
    if len(tokens) < len(WINDOWS) * length:
        raise InputError(
            f"{source}: the calibration text has {len(tokens)} tokens, {len(WINDOWS) * length} "
            f"expected for {len(WINDOWS)} windows of {length}; give a longer text or shorter "
            "--lengths"
        )
    starts = [index * (len(tokens) // len(WINDOWS)) for index in range(len(WINDOWS))]
    return {
        window: prefix + tokens[start : start + length]
        for window, start in zip(WINDOWS, starts, strict=True)
    }


def capture(
    model: SourceModel,
    windows: dict[str, list[int]],
    directory: Path,
    on_progress: Callable[[float], None],
) -> Capture:
    """Runs the model over each window and keeps every layer's Q, K and V.

    Args:
        model: The model.
        windows: Token ids from ``cut_windows``.
        directory: Folder to keep captures in; one made of the same weights and tokens is reused.
        on_progress: Called with 1 after each layer of each window.

    Raises:
        InputError: The weights cannot be read, or a layer's attention is not supported.
        OSError: The disk is full.
    """
    digest = hashlib.sha256(model.digest().encode())
    digest.update(repr(sorted(windows.items())).encode())
    shape = model.fingerprint
    taken = Capture(directory / f"capture-{digest.hexdigest()[:16]}", shape.num_layers)
    todo = taken.missing()
    for _ in range(shape.num_layers * (len(WINDOWS) - len(todo))):
        on_progress(1.0)
    if not todo:
        return taken
    taken.directory.mkdir(exist_ok=True)
    _check_space(model, taken.directory, sum(len(windows[window]) for window in todo))
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _no_recorder)
    body = load_weights(model, ATTENTION, with_head=False)
    for window in todo:
        recorder = Recorder(taken, window, on_progress)
        recorder.run(body, windows[window])
        if recorder.layers != list(range(shape.num_layers)):
            raise InputError(
                f"{model.name}: attention of {shape.num_layers} layers expected, "
                f"seen for {len(recorder.layers)}"
            )
    return taken


def _check_space(model: SourceModel, directory: Path, num_tokens: int) -> None:
    shape = model.fingerprint
    heads = shape.num_heads + 2 * shape.num_kv_heads
    needed_bytes = shape.num_layers * heads * shape.head_dim * 2 * num_tokens
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise InputError(
            f"{directory}: {needed_bytes / 1e9:.1f} GB expected for captured tensors, "
            f"{free_bytes / 1e9:.1f} GB free"
        )


class Recorder:
    """The attention function of one run over one window.

    Args:
        taken: Where the layers' tensors go.
        window: Which window of them this is.
        on_progress: Called with 1 after each layer.

    Attributes:
        layers: Indices of the layers seen, in order.
    """

    def __init__(self, taken: Capture, window: str, on_progress: Callable[[float], None]) -> None:
        self.layers: list[int] = []
        self._taken = taken
        self._window = window
        self._on_progress = on_progress

    def run(self, body: torch.nn.Module, tokens: Sequence[int]) -> None:
        """Runs a body whose attention is named ``ATTENTION`` over a window's token ids."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, self._attend)
        try:
            with torch.inference_mode():
                device = next(body.parameters()).device
                body(input_ids=torch.tensor([tokens], device=device), use_cache=False)
        finally:
            AttentionInterface.register(ATTENTION, _no_recorder)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **variants: Any,
    ) -> tuple[torch.Tensor, None]:
        used = [name for name in _VARIANTS if variants.get(name) is not None]
        if used or attention_mask is not None:
            name = used[0] if used else "attention_mask"
            raise InputError(f"layer {module.layer_idx}: {name}: plain causal attention expected")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._save(module.layer_idx, query, key, value, scale)
        self.layers.append(module.layer_idx)
        self._on_progress(1.0)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    def _save(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        softmax_scale: float,
    ) -> None:
        path = self._taken.path(layer, self._window)
        tensors = {
            name: tensor[0].transpose(0, 1).to(torch.bfloat16).cpu().contiguous()
            for name, tensor in (("query", query), ("key", key), ("value", value))
        }
        partial = path.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"softmax_scale": repr(softmax_scale)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot write the capture: {one_line(error)}") from None
        partial.replace(path)


def _no_recorder(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the captured model runs only under a recorder")
