"""What is asked of a model, wherever it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_afbs.tuning.model import SourceModel

TOP = 20
"""Of a next-token distribution what a server tells unless it is started to tell more."""


@dataclass(frozen=True)
class NextToken:
    """How the token after a prompt is predicted.

    Attributes:
        loss: Negative log likelihood of the token that follows in the text, nats.
        top: The likeliest token ids and their probabilities.
        log_probs: Of the whole vocabulary, fp32; None where only the top is told.
    """

    loss: float
    top: Mapping[int, float]
    log_probs: torch.Tensor | None


class Predictor(Protocol):
    """A model, dense or with one selection, in this process or behind a server."""

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """Negative log likelihood of every token after the first, in nats, ``[length - 1]``."""

    def next_token(self, tokens: Sequence[int], target: int) -> NextToken:
        """Predicts the token after a prompt."""

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of at most so many tokens, without the token that ended them."""

    def sparsity(self) -> float:
        """Share of the block products that was skipped in all that was asked so far."""


def end_tokens(model: SourceModel) -> set[int]:
    """Token ids that end an answer, as vLLM takes them: from the generation's configuration."""
    from transformers import GenerationConfig

    directory = model.directory()
    if (directory / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
    else:
        ends = model.config.get_text_config().eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}
