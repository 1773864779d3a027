"""Scores a prompt's own tokens in the worker that computes it, a few rows of logits at a time.

vLLM's ``prompt_logprobs`` gives the loss of each token, and no divergence between two whole
distributions. All logits of a long prompt are tens of gigabytes, so none are kept but those of
chosen positions, for a later comparison.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from vllm_afbs.backends import adapters

_ROWS = 1024
"""Rows of logits that are made at once."""


class Scoring:
    """Scores one prompt, which has to be the only one that is computed.

    Args:
        model: vLLM's model, whose last stage's hidden states are scored.
        tokens: The prompt.
        positions: Positions whose predictions are scored, ascending, without the prompt's last.
        keep: Whether the log-probabilities are kept.
        against: Log-probabilities of another prompt at the same positions, to compare with.
    """

    def __init__(
        self,
        model: Any,
        tokens: Sequence[int],
        positions: torch.Tensor,
        keep: bool = False,
        against: "Scoring | None" = None,
    ) -> None:
        self._model = model
        self._positions = positions
        self._targets = torch.tensor(tokens)[positions + 1]
        self._keep = keep
        self._against = against
        self._num_seen = 0
        self._losses: list[torch.Tensor] = []
        self._kept: list[torch.Tensor] = []
        self._kl = 0.0
        self._hook = model.register_forward_hook(self._score)

    def end(self) -> None:
        """Stops listening to the model."""
        self._hook.remove()

    @property
    def losses(self) -> torch.Tensor | None:
        """Loss at each position in nats, fp32; None if other ranks have the logits."""
        return torch.cat(self._losses) if self._losses else None

    @property
    def kl(self) -> float:
        """Mean divergence of these predictions from those compared with, in nats."""
        return self._kl / len(self._positions)

    def _score(self, _: Any, __: Any, output: Any) -> None:
        metadata = get_forward_context().attn_metadata
        if not metadata or not isinstance(output, torch.Tensor | tuple):
            return  # vLLM warms up, or another pipeline stage has the last layer
        hidden = output[0] if isinstance(output, tuple) else output
        start, self._num_seen = self._num_seen, self._num_seen + _num_tokens(metadata)
        inside = (self._positions >= start) & (self._positions < self._num_seen)
        rows = (self._positions[inside] - start).to(hidden.device)
        first = int((self._positions < start).sum())
        for at in range(0, len(rows), _ROWS):
            chosen = rows[at : at + _ROWS]
            with adapters.one_prompts_logits(len(chosen)):
                logits = self._model.compute_logits(hidden[chosen])
            if logits is not None:
                self._add(logits.float(), first + at)

    def _add(self, logits: torch.Tensor, first: int) -> None:
        targets = self._targets[first : first + len(logits)].to(logits.device)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        self._losses.append(losses.cpu())
        if not self._keep and self._against is None:
            return
        log_probs = torch.log_softmax(logits, dim=-1)
        if self._keep:
            self._kept.append(log_probs.cpu())
        if self._against is not None:
            dense = self._against.rows(first, len(logits)).to(logits.device)
            kl = (dense.exp() * (dense - log_probs)).sum(-1, dtype=torch.float64)
            self._kl += float(kl.sum())

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Kept log-probabilities, ``[count, vocabulary]``, fp32, on the CPU."""
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0][first : first + count]


def _num_tokens(metadata: Any) -> int:
    """Tokens of the step without padding; layers of some kinds do not say."""
    each = metadata if isinstance(metadata, dict) else metadata[0]
    return next(
        int(found.num_actual_tokens)
        for found in each.values()
        if hasattr(found, "num_actual_tokens")
    )
