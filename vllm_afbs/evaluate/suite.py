"""The questions of an evaluation, and a model's answers to them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_afbs.errors import InputError
from vllm_afbs.evaluate.predictor import NextToken, Predictor
from vllm_afbs.evaluate.prompts import Prompt, make_prompts
from vllm_afbs.evaluate.retrieval import KINDS
from vllm_afbs.tuning.texts import Text
from vllm_afbs.tuning.windows import first_tokens, tokenize


@dataclass(frozen=True)
class Amounts:
    """How much is asked.

    Attributes:
        length: Tokens of the longest prompt.
        windows: Windows of text to measure perplexity on; fewer if the text is too short for them.
        prefixes: Prompts cut out of the text of which only the next token is scored.
        continuations: Prompts cut out of the text that are continued greedily.
        new_tokens: Tokens of a continuation.
        per_kind: Retrieval prompts of each kind.
        kinds: Kinds of retrieval.
        seed: Seed of the places where texts are cut and of the facts hidden in them.
        shortest: Fewest tokens with which a prompt runs sparse; with fewer, dense answers would be
            compared with dense ones.
    """

    length: int
    windows: int = 4
    prefixes: int = 64
    continuations: int = 16
    new_tokens: int = 64
    per_kind: int = 11
    kinds: tuple[str, ...] = tuple(KINDS)
    seed: int = 0
    shortest: int = 0


@dataclass(frozen=True)
class Suite:
    """All prompts of an evaluation, as token ids.

    Attributes:
        windows: Windows of text, all of one length.
        prefixes: Prompts, each with the token that follows it in the text.
        continued: Prompts that are continued greedily.
        new_tokens: Tokens that they are continued by.
        retrieval: Prompts with known answers.
        decode: Turns token ids into text.
    """

    windows: Sequence[list[int]]
    prefixes: Sequence[tuple[list[int], int]]
    continued: Sequence[list[int]]
    new_tokens: int
    retrieval: Sequence[Prompt]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class Answers:
    """What a model answers to a suite, in the suite's order.

    Attributes:
        losses: The losses of each window's tokens, ``[length - 1]`` each.
        next_tokens: The prediction after each prefix.
        continuations: Token ids that continue each prompt.
        retrieved: The share of the expected strings found, by retrieval prompt.
        sparsity: Share of block products skipped in the windows, or in all prompts if there are no
            windows.
    """

    losses: Sequence[torch.Tensor]
    next_tokens: Sequence[NextToken]
    continuations: Sequence[list[int]]
    retrieved: Sequence[float]
    sparsity: float


def make_suite(tokenizer: Any, text: Text, amounts: Amounts) -> Suite:
    """Cuts a text and hides facts in it.

    Windows are spread evenly over the text and share no token. Prefixes begin anywhere; their
    lengths lie between half of ``amounts.length`` (or ``amounts.shortest``, if that is larger) and
    all of it.

    Raises:
        InputError: The text is too short, or ``amounts.length`` is too short for every prompt to
            run sparse.
    """
    prefix, tokens = first_tokens(tokenizer), tokenize(tokenizer, text)
    length = amounts.length - len(prefix)
    if len(tokens) <= length:
        raise InputError(
            f"{text.name}: the text has {len(tokens)} tokens; at least {length + 1} expected for a "
            f"window of {amounts.length}"
        )
    num_windows = min(amounts.windows, len(tokens) // length)
    rng = random.Random(amounts.seed)

    def cut(size: int) -> list[int]:
        start = rng.randrange(len(tokens) - size)
        return [*prefix, *tokens[start : start + size]]

    apart = len(tokens) // max(num_windows, 1)
    least = min(length - 1, max(length // 2, amounts.shortest - len(prefix)))
    sizes = [rng.randint(least, length - 1) for _ in range(amounts.prefixes)]
    longer = [cut(size + 1) for size in sizes]
    shortened = length - amounts.new_tokens
    try:
        retrieval = make_prompts(
            tokenizer, text.content, amounts.length, amounts.per_kind, amounts.seed, amounts.kinds
        )
    except ValueError as error:
        raise InputError(f"{text.name}: retrieval prompts: {error}") from None
    continued = [cut(shortened) for _ in range(amounts.continuations)]
    prompts = [*(each[:-1] for each in longer), *continued, *(each.tokens for each in retrieval)]
    fewest = min(map(len, prompts), default=amounts.shortest)
    if fewest < amounts.shortest:
        raise InputError(
            f"--length: at least {amounts.length + amounts.shortest - fewest} expected, got "
            f"{amounts.length}: prompts of {fewest} tokens would run dense"
        )
    return Suite(
        windows=[[*prefix, *tokens[i * apart : i * apart + length]] for i in range(num_windows)],
        prefixes=[(each[:-1], each[-1]) for each in longer],
        continued=continued,
        new_tokens=amounts.new_tokens,
        retrieval=retrieval,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
    )


def ask(predictor: Predictor, suite: Suite) -> Answers:
    """Asks a model all questions of a suite."""
    losses = [predictor.losses(window) for window in suite.windows]
    sparsity = predictor.sparsity() if losses else None
    next_tokens = predictor.next_tokens(suite.prefixes)
    continuations = predictor.generate(suite.continued, suite.new_tokens)
    retrieved: list[float] = [0.0] * len(suite.retrieval)
    for room in {prompt.num_tokens for prompt in suite.retrieval}:
        chosen = [i for i, prompt in enumerate(suite.retrieval) if prompt.num_tokens == room]
        answers = predictor.generate([suite.retrieval[i].tokens for i in chosen], room)
        for i, answer in zip(chosen, answers, strict=True):
            retrieved[i] = suite.retrieval[i].score(suite.decode(answer))
    if sparsity is None:
        sparsity = predictor.sparsity()
    return Answers(losses, next_tokens, continuations, retrieved, sparsity)
