"""Transformers in this process as the tuner's engine: plain decoders, on one device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from vllm_afbs.captures import Capture
from vllm_afbs.kernels import BlockGeometry, HeadThresholds, select_blocks
from vllm_afbs.models.in_process import attention, quantised
from vllm_afbs.models.in_process.attention import AttentionCall
from vllm_afbs.models.in_process.logits import token_losses
from vllm_afbs.models.in_process.masked import masked_attention
from vllm_afbs.models.in_process.recorder import capture_windows
from vllm_afbs.models.in_process.source import SourceModel
from vllm_afbs.models.in_process.weights import load_weights
from vllm_afbs.profile.tuner_run import TunedOn
from vllm_afbs.tuning.engine import Adapter, Compared, compared_positions

_ATTENTION = "afbs_sparse"


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions at some positions of a window.

    Attributes:
        log_probs: ``[num_positions, vocabulary]``, fp32.
        targets: The tokens that follow, ``[num_positions]``, int64.
    """

    log_probs: torch.Tensor
    targets: torch.Tensor

    @property
    def loss(self) -> float:
        """Mean negative log likelihood of the tokens that follow, in nats."""
        return -float(self.log_probs.gather(1, self.targets[:, None]).double().mean())

    def kl_to(self, other: "Predictions") -> float:
        """Mean KL divergence of another's predictions from these, in nats."""
        gap = self.log_probs - other.log_probs
        return float((self.log_probs.exp() * gap).sum(-1, dtype=torch.float64).mean())


class TransformersEngine:
    """A model that transformers runs; see ``tuning.engine.Engine``.

    Args:
        model: The model. Its weights are loaded when it is first run.
    """

    def __init__(self, model: SourceModel) -> None:
        self._model = model

    def tuned_on(self) -> TunedOn:
        """See ``Engine``."""
        settings = quantised.quantization(self._model.config)
        return TunedOn(
            engine=f"transformers {version('transformers')}",
            quantization=None if settings is None else str(settings.get("quant_method")),
        )

    def capture(
        self,
        windows: Mapping[str, list[int]],
        taken: Capture,
        on_progress: Callable[[float], None],
    ) -> None:
        """See ``Engine``."""
        capture_windows(self._model, windows, taken, on_progress)

    def sparse_model(self, block_q: int, block_k: int) -> "EndToEnd":
        """See ``Engine``."""
        return EndToEnd(self._model, block_q, block_k)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """See ``Engine``; arguments of vLLM would name them."""
        return ()

    def make_room(self) -> None:
        """See ``Engine``; nothing stays loaded after a capture."""


class EndToEnd:
    """A model whose layers can be made sparse.

    It chooses blocks as the server does, but masks the products that the server would skip, so a
    run takes as long as a dense one.

    Args:
        model: The model; its weights are loaded.
        block_q: Rows of a query block.
        block_k: Keys of a key block.

    Raises:
        InputError: The weights cannot be read.
    """

    def __init__(self, model: SourceModel, block_q: int, block_k: int) -> None:
        attention.register(_ATTENTION, self._attend)
        self._model: Any = load_weights(model, _ATTENTION, with_head=True)
        self._blocks = (block_q, block_k)
        self._thresholds: Mapping[int, HeadThresholds] = {}
        self._dense: dict[tuple[int, ...], Predictions] = {}

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        """See ``tuning.engine.SparseModel``."""
        window = tuple(tokens)
        if window not in self._dense:
            self._dense[window] = self.predict(tokens, {})
        dense, sparse = self._dense[window], self.predict(tokens, thresholds)
        return Compared(dense.loss, sparse.loss, dense.kl_to(sparse))

    def predict(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> Predictions:
        """Predicts a window's tokens.

        Args:
            tokens: Token ids of the window.
            thresholds: Thresholds of the layers that run sparse, by the layer's index.
        """
        self._thresholds = thresholds
        positions = torch.tensor(compared_positions(len(tokens)))
        device = next(self._model.parameters()).device
        ids = torch.tensor([tokens], device=device)
        with torch.inference_mode():
            logits = self._model(
                input_ids=ids, use_cache=False, logits_to_keep=positions.to(device)
            ).logits[0]
            log_probs = torch.log_softmax(logits.float(), dim=-1)
        return Predictions(log_probs, ids[0, positions.to(device) + 1])

    def losses(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> torch.Tensor:
        """Negative log likelihood of every token after a window's first, ``[length - 1]``, fp32."""
        self._thresholds = thresholds
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            return token_losses(self._model, torch.tensor([tokens], device=device))

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        thresholds = self._thresholds.get(call.layer)
        if thresholds is None:
            return call.dense()
        query, key, _ = call.rows()
        geometry = BlockGeometry(len(query), len(query), *self._blocks)
        keep = select_blocks(query, key, thresholds.to(query.device), geometry, call.softmax_scale)
        return masked_attention(
            call.query, call.key, call.value, keep, geometry, call.softmax_scale
        )
