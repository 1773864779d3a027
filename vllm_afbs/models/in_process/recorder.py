"""Capturing each layer's Q, K and V with transformers: an attention function that writes them."""

from collections.abc import Callable, Mapping, Sequence

import torch

from vllm_afbs.captures import Capture, HeadCounts, LayerWriter
from vllm_afbs.errors import InputError, one_line
from vllm_afbs.models.in_process import attention
from vllm_afbs.models.in_process.attention import AttentionCall
from vllm_afbs.models.in_process.source import SourceModel
from vllm_afbs.models.in_process.weights import load_weights
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.tuning import memory

ATTENTION = "afbs_capture"
"""Name of the recorded attention function among transformers'."""


def capture_windows(
    model: SourceModel,
    windows: Mapping[str, list[int]],
    taken: Capture,
    on_progress: Callable[[float], None],
) -> None:
    """Loads a decoder's body and runs it over each window; see ``tuning.engine.Engine``."""
    shape = model.fingerprint
    attention.register(ATTENTION, _no_recorder)
    body = load_weights(model, ATTENTION, with_head=False)
    for window, tokens in windows.items():
        recorder = Recorder(taken, shape, window, on_progress)
        try:
            with memory.explained(
                f"running the model over {len(tokens)} tokens",
                "shorter --lengths expected, or a machine with more memory",
            ):
                recorder.run(body, tokens)
        except InputError as error:
            raise InputError(f"{model.name}: {error}") from None
        if recorder.layers != list(taken.layers):
            raise InputError(
                f"{model.name}: attention of {len(taken.layers)} layers expected, "
                f"seen for {len(recorder.layers)}"
            )


class Recorder:
    """The attention function of one run over one window.

    Args:
        taken: Where the layers' tensors go.
        shape: What every layer has to have.
        window: Which window of them this is.
        on_progress: Called with 1 after each layer that is kept.

    Attributes:
        layers: Indices of the layers that were kept, in order.
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
            if call.variants:
                raise InputError(
                    f"layer {call.layer}: {call.variants[0]}: plain causal attention expected"
                )
            if call.layer in self._taken.layers:
                self._check(call)
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
        if call.is_local:
            raise InputError(f"{layer}: attention to the whole context expected")
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
        shape = self._shape
        counts = HeadCounts(shape.num_heads, shape.num_kv_heads, shape.head_dim)
        query, key, value = call.rows()
        path = self._taken.path(call.layer, self._window)
        LayerWriter(path, counts, len(query), call.softmax_scale).add(query, key, value)


def _no_recorder(_: AttentionCall) -> torch.Tensor:
    raise RuntimeError("the captured model runs only under a recorder")
