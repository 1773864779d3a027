"""Cutting calibration texts into the windows of tokens that the model is run over.

One *calibration* window is packed from equal shares of every text, each from its text's start.
*Held-out* windows of the whole length are spread over the rest of each text and share no token with
the calibration window. There are at least two, since one passage of a text (a table, a listing) can
differ from all others.

*Acceptance* windows lie between the others and share no token with them. The search never sees
them: they only decide, at the end, whether a promise about perplexity holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from vllm_afbs.captures import CALIBRATION
from vllm_afbs.errors import InputError
from vllm_afbs.tuning.texts import Text

_LEAST_HELD_OUT = 2
NUM_ACCEPTANCE = 6
"""Acceptance windows of all texts together; rounded up, so that each text has as many. Each takes
one dense run of the model and one sparse run per candidate."""


def held_out(num_texts: int) -> tuple[str, ...]:
    """Names of the held-out windows, text by text."""
    per_text = -(-_LEAST_HELD_OUT // num_texts)
    return tuple(f"validation-{i}-{part}" for i in range(num_texts) for part in range(per_text))


def by_text(names: Sequence[str]) -> list[list[str]]:
    """Groups names of held-out windows by the text that they come from."""
    return [list(group) for _, group in groupby(names, lambda name: name.rpartition("-")[0])]


@dataclass(frozen=True)
class Part:
    """An acceptance window.

    Attributes:
        text: Name of the text that it is cut from.
        start: Where it starts in that text, in tokens.
        num_tokens: Tokens of that text.
        tokens: Token ids, including the tokenizer's own first token.
    """

    text: str
    start: int
    num_tokens: int
    tokens: list[int]


@dataclass(frozen=True)
class Cut:
    """The windows of a job.

    Attributes:
        windows: Token ids by window, all of one length; the calibration window comes first.
        num_tokens: Tokens taken from each text. A token that two windows share counts once, and the
            tokenizer's own first token does not count, and neither do acceptance windows.
        acceptance: The acceptance windows, as many of each text; none unless asked for.
    """

    windows: dict[str, list[int]]
    num_tokens: list[int]
    acceptance: list[Part] = field(default_factory=list)


def cut_windows(
    tokenizer: Any, texts: Sequence[Text], length: int, *, accepting: bool = False
) -> Cut:
    """Tokenizes the texts and cuts them.

    Args:
        tokenizer: The model's, of transformers.
        texts: The calibration texts, at least one.
        length: Tokens of a window, including the tokenizer's own first token, if it adds one.
        accepting: Whether to cut acceptance windows, too.

    Raises:
        InputError: A text is too short.
    """
    tokens = [tokenize(tokenizer, text) for text in texts]
    names = [f"{text.name} ({text.coverage})" if text.coverage else text.name for text in texts]
    return cut_tokens(tokens, names, first_tokens(tokenizer), length, accepting=accepting)


def first_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts in front of every text, or none."""
    first: list[int] = tokenizer("").input_ids
    return first[:1] if first and first[0] == tokenizer.bos_token_id else []


def tokenize(tokenizer: Any, text: Text) -> list[int]:
    """A text's token ids, without special tokens."""
    ids: list[int] = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
    return ids


def cut_tokens(
    tokens: Sequence[Sequence[int]],
    names: Sequence[str],
    prefix: Sequence[int],
    length: int,
    *,
    accepting: bool = False,
) -> Cut:
    """Cuts tokenized texts.

    Args:
        tokens: Each text's token ids.
        names: Where each text came from, for the message.
        prefix: Tokens that every window begins with.
        length: Tokens of a window, including ``prefix``.
        accepting: Whether to cut acceptance windows, too.

    Raises:
        InputError: A text is too short.
    """
    length -= len(prefix)
    whole, rest = divmod(length, len(tokens))
    shares = [whole + (index < rest) for index in range(len(tokens))]
    calibration = list(prefix)
    windows = {CALIBRATION: calibration}
    num_tokens, free = [], []
    groups = by_text(held_out(len(tokens)))
    for text, name, share, group in zip(tokens, names, shares, groups, strict=True):
        starts = _held_out_starts(name, len(text), share, length, len(group))
        calibration += text[:share]
        taken = set(range(share))
        for window, start in zip(group, starts, strict=True):
            windows[window] = [*prefix, *text[start : start + length]]
            taken.update(range(start, start + length))
        num_tokens.append(len(taken))
        ends = [share, *(start + length for start in starts)]
        free.append(_between(ends, [*starts, len(text)], length))
        if accepting and not free[-1]:
            # From then on, each of the gaps around the held-out windows has room for one.
            needed = share + length + 2 * len(group) * length
            raise InputError(
                f"{name}: the calibration text has {len(text)} tokens, {needed} expected for "
                f"--max-perplexity-increase, which is accepted on windows of {length} that nothing "
                "else has seen; give a longer text or shorter --lengths"
            )
    parts = _acceptance(tokens, names, prefix, length, free) if accepting else []
    return Cut(windows, num_tokens, parts)


def _held_out_starts(name: str, num_tokens: int, share: int, length: int, count: int) -> list[int]:
    """Where a text's held-out windows start, spread over what its calibration share leaves.

    Raises:
        InputError: The text is too short.
    """
    room = num_tokens - share - length
    if room < 0:
        raise InputError(
            f"{name}: the calibration text has {num_tokens} tokens, {share + length} expected for "
            f"{share} of the calibration window and a held-out window of {length}; give a longer "
            "text or shorter --lengths"
        )
    return [share + room * (2 * part + 1) // (2 * count) for part in range(count)]


def _between(ends: Sequence[int], starts: Sequence[int], length: int) -> list[int]:
    """Where windows start that fill the gaps of a text, spread over each gap.

    Args:
        ends: Where the gaps begin: the ends of the windows that are cut already.
        starts: Where the gaps end.
        length: Tokens of a window.
    """
    found = []
    for begin, end in zip(ends, starts, strict=True):
        count = max(0, end - begin) // length
        slack = end - begin - count * length
        found += [begin + slack * (i + 1) // (count + 1) + i * length for i in range(count)]
    return found


def _acceptance(
    tokens: Sequence[Sequence[int]],
    names: Sequence[str],
    prefix: Sequence[int],
    length: int,
    free: Sequence[Sequence[int]],
) -> list[Part]:
    """Cuts as many windows of each text, spread over the places that are free in it."""
    count = min(-(-NUM_ACCEPTANCE // len(tokens)), *map(len, free))
    return [
        Part(name, start, length, [*prefix, *text[start : start + length]])
        for text, name, places in zip(tokens, names, free, strict=True)
        for start in (places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count))
    ]
