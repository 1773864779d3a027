"""The interface to a model, in this process or behind a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

TOP = 20
"""Number of likeliest tokens that a server reports at most, unless started to report more."""


@dataclass(frozen=True)
class NextToken:
    """How the token after a prompt is predicted.

    Attributes:
        loss: Negative log likelihood of the token that follows in the text, nats.
        top: The likeliest token ids and their probabilities.
        log_probs: Log-probabilities of the whole vocabulary, fp32; None if only the top is known.
    """

    loss: float
    top: Mapping[int, float]
    log_probs: torch.Tensor | None


class Predictor(Protocol):
    """A model, dense or with one selection, in this process or behind a server."""

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """Negative log likelihood of every token after the first, in nats, ``[length - 1]``."""

    def next_tokens(self, prefixes: Sequence[tuple[list[int], int]]) -> list[NextToken]:
        """Predicts the token after each prompt, of which the one that follows is given."""

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Continues prompts greedily; an answer does not include the token that ended it."""

    def sparsity(self) -> float:
        """Share of the block products that were skipped in all calls so far."""


class Evaluated(Protocol):
    """A model that is described, but perhaps not loaded."""

    def directory(self) -> Path:
        """The directory with the configuration and the tokenizer."""

    def eos_token_id(self) -> int | list[int] | None:
        """Token ids that end an answer, by the model's configuration."""


def end_tokens(model: Evaluated) -> set[int]:
    """Reads the token ids that end an answer, from ``generation_config.json`` as vLLM does."""
    from transformers import GenerationConfig

    directory = model.directory()
    if (directory / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
    else:
        ends = model.eos_token_id()
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """An answer without the token that ended it, and all that follows."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
