"""A model in this process that computes what a server does: sparse prefills, dense decoding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vllm_afbs.errors import InputError
from vllm_afbs.evaluate.methods import ALWAYS, Layer, Method, Selection
from vllm_afbs.evaluate.predictor import TOP, NextToken, end_tokens, until_end
from vllm_afbs.models.in_process import attention
from vllm_afbs.models.in_process.attention import AttentionCall
from vllm_afbs.models.in_process.logits import token_losses
from vllm_afbs.models.in_process.masked import masked_attention
from vllm_afbs.models.in_process.source import SourceModel
from vllm_afbs.models.in_process.weights import load_weights

_ATTENTION = "afbs_evaluated"
_DECODED_AT_ONCE = 16
_CACHED_TOKENS = 1 << 17
"""Prompts that are decoded at once have at most as many tokens, padding included."""


class Counter:
    """Counts the blocks that were computed and skipped."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | int = 0
        self._visible = 0

    def add(self, kept: torch.Tensor | int, visible: int) -> None:
        """Adds one layer's kept and visible blocks."""
        self._kept = self._kept + kept
        self._visible += visible

    @property
    def sparsity(self) -> float:
        """Share of dense causal attention's block products that were skipped."""
        return 1.0 - int(self._kept) / self._visible if self._visible else 0.0


class Runner:
    """A loaded model whose prefills can be made sparse by any method.

    Args:
        model: The model; its weights are loaded, on a GPU when there is one.

    Raises:
        InputError: The weights cannot be read, or some layers have no full attention.
    """

    def __init__(self, model: SourceModel) -> None:
        num_full, num_layers = len(model.full_layers), model.fingerprint.num_layers
        if num_full < num_layers:
            raise InputError(
                f"{model.name}: full attention in all {num_layers} layers expected where "
                f"transformers runs the model, {num_full} have it: evaluate it with --engine vllm"
            )
        attention.register(_ATTENTION, self._attend)
        self._model: Any = load_weights(model, _ATTENTION, with_head=True)
        self._device = next(self._model.parameters()).device
        self._selection: Selection | None = None
        self._counter = Counter()
        self._watched: Sequence[tuple[Method, list[torch.Tensor]]] = ()
        self._padding: torch.Tensor | None = None  # of the batch that is being decoded
        self._ends = end_tokens(model)

    @contextmanager
    def selecting(self, selection: Selection | None, counter: Counter) -> Iterator[None]:
        """Runs prefills with a selection, or dense, and counts their blocks."""
        before = self._selection, self._counter
        self._selection, self._counter = selection, counter
        try:
            yield
        finally:
            self._selection, self._counter = before

    def levels(
        self,
        windows: Sequence[Sequence[int]],
        methods: Sequence[Method],
        selection: Selection | None = None,
    ) -> list[list[torch.Tensor]]:
        """Runs the model over texts and collects the levels of all visible blocks.

        Args:
            windows: Token ids of each text.
            methods: The methods that give the levels.
            selection: The selection that the model runs with; None runs it dense.

        Returns:
            For each method, the levels of every layer of every window, in that order.
        """
        watched: list[tuple[Method, list[torch.Tensor]]] = [(method, []) for method in methods]
        self._watched = watched
        try:
            with self.selecting(selection, Counter()):
                for tokens in windows:
                    self._logits(tokens, 1)
        finally:
            self._watched = ()
        return [levels for _, levels in watched]

    @torch.inference_mode()
    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """Negative log likelihood of every token after the first, in nats, ``[length - 1]``."""
        return token_losses(self._model, torch.tensor([tokens], device=self._device))

    @torch.inference_mode()
    def next_token(self, tokens: Sequence[int], target: int) -> NextToken:
        """The distribution of the token after a prompt."""
        log_probs = torch.log_softmax(self._logits(tokens, 1)[-1].float(), -1)
        values, ids = log_probs.exp().topk(TOP)
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return NextToken(-float(log_probs[target]), top, log_probs.cpu())

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Continues prompts greedily; an answer does not include the token that ended it."""
        answers: list[list[int]] = []
        longest = max(map(len, prompts), default=1)
        size = max(1, min(_DECODED_AT_ONCE, _CACHED_TOKENS // longest))
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            answers += [until_end(each, self._ends) for each in self._decode(batch, num_tokens)]
        return answers

    @torch.inference_mode()
    def _logits(self, tokens: Sequence[int], last: int) -> torch.Tensor:
        """Logits of the last ``last`` positions, ``[last, vocabulary]``."""
        ids = torch.tensor([tokens], device=self._device)
        output = self._model(input_ids=ids, use_cache=False, logits_to_keep=last)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _decode(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Prefills prompts one by one, then decodes them as one batch, padded on the left."""
        from transformers import DynamicCache

        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        longest = int(lengths.max())
        first, caches = [], []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self._device)
            output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            first.append(output.logits[0, -1].argmax())
            caches.append(output.past_key_values)
        cache = DynamicCache()
        for layer in range(len(caches[0].layers)):
            keys = _padded([each.layers[layer].keys for each in caches], longest)
            values = _padded([each.layers[layer].values for each in caches], longest)
            cache.update(keys, values, layer)
        del caches
        tokens = [torch.stack(first)]
        self._padding = longest - lengths
        try:
            for step in range(num_tokens - 1):
                output = self._model(
                    input_ids=tokens[-1][:, None],
                    past_key_values=cache,
                    position_ids=(lengths + step)[:, None],
                    use_cache=True,
                )
                tokens.append(output.logits[:, -1].argmax(-1))
        finally:
            self._padding = None
        decoded: list[list[int]] = torch.stack(tokens, 1).tolist()
        return decoded

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        if self._padding is not None:
            positions = torch.arange(call.key.shape[2], device=call.key.device)
            there = positions >= self._padding[:, None]
            return call.dense(there[:, None, None])
        query, key, _ = call.rows()
        layer = Layer(call.layer, query, key, call.softmax_scale)
        for method, seen in self._watched:
            seen.append(_visible_levels(method, layer))
        return self._prefill(layer, call)

    def _prefill(self, layer: Layer, call: AttentionCall) -> torch.Tensor:
        length, num_heads, _ = layer.query.shape
        selection = self._selection
        if selection is None or selection.method.is_dense(layer.index, length):
            if selection is not None:
                visible = num_heads * selection.method.geometry(length).num_visible
                self._counter.add(visible, visible)
            return call.dense()
        geometry = selection.method.geometry(length)
        keep = selection.keep(layer)
        self._counter.add(keep.sum(), num_heads * geometry.num_visible)
        return masked_attention(
            call.query, call.key, call.value, keep, geometry, call.softmax_scale,
            corrects=selection.method.corrects,
        )  # fmt: skip


def _padded(rows: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """Joins the caches of single prompts into one batch, with zeros before the shorter ones."""
    return torch.cat(
        [torch.nn.functional.pad(each, (0, 0, length - each.shape[2], 0)) for each in rows]
    )


def _visible_levels(method: Method, layer: Layer) -> torch.Tensor:
    geometry = method.geometry(len(layer.query))
    if method.is_dense(layer.index, len(layer.query)):
        return layer.query.new_full(
            (layer.query.shape[1] * geometry.num_visible,), ALWAYS, dtype=torch.float64
        )
    levels = method.levels(layer)
    return levels[:, geometry.visible.to(levels.device)].flatten()


class InProcess:
    """A ``Predictor`` that runs the model in this process with one selection.

    Args:
        runner: The loaded model; several predictors may share it.
        selection: The selection; None runs the model dense.
    """

    def __init__(self, runner: Runner, selection: Selection | None) -> None:
        self._runner = runner
        self._selection = selection
        self._counter = Counter()

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """See ``Predictor``."""
        with self._runner.selecting(self._selection, self._counter):
            return self._runner.losses(tokens)

    def next_tokens(self, prefixes: Sequence[tuple[list[int], int]]) -> list[NextToken]:
        """See ``Predictor``."""
        with self._runner.selecting(self._selection, self._counter):
            return [self._runner.next_token(*prefix) for prefix in prefixes]

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """See ``Predictor``."""
        with self._runner.selecting(self._selection, self._counter):
            return self._runner.generate(prompts, num_tokens)

    def sparsity(self) -> float:
        """See ``Predictor``."""
        return 0.0 if self._selection is None else self._counter.sparsity
