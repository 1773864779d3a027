"""Cutting calibration texts into the windows of tokens that the model is run over.

One *calibration* window is packed from equal shares of every text, each from its text's start.
*Held-out* windows of the whole length are spread over the rest of each text and share no token with
the calibration window. There are at least two, since one passage of a text (a table, a listing) can
differ from all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vllm_afbs.tuning.model import InputError, SourceModel, one_line
from vllm_afbs.tuning.texts import Text

CALIBRATION = "calibration"
"""Name of the calibration window."""
_LEAST_HELD_OUT = 2


def held_out(num_texts: int) -> tuple[str, ...]:
    """Names of the held-out windows, text by text."""
    per_text = -(-_LEAST_HELD_OUT // num_texts)
    return tuple(f"validation-{i}-{part}" for i in range(num_texts) for part in range(per_text))


def by_text(names: Sequence[str]) -> list[list[str]]:
    """Groups names of held-out windows by the text that they come from."""
    return [list(group) for _, group in groupby(names, lambda name: name.rpartition("-")[0])]


@dataclass(frozen=True)
class Cut:
    """The windows of a job.

    Attributes:
        windows: Token ids by window, all of one length; the calibration window comes first.
        num_tokens: Tokens taken from each text. A token that two windows share counts once, and the
            tokenizer's own first token does not count.
    """

    windows: dict[str, list[int]]
    num_tokens: list[int]


def cut_windows(model: SourceModel, texts: Sequence[Text], length: int) -> Cut:
    """Tokenizes the texts and cuts them.

    Args:
        model: The model, for its tokenizer.
        texts: The calibration texts, at least one.
        length: Tokens of a window, including the tokenizer's own first token, if it adds one.

    Raises:
        InputError: The tokenizer cannot be read, or a text is too short.
    """
    tokenizer = load_tokenizer(model)
    tokens = [tokenize(tokenizer, text) for text in texts]
    names = [f"{text.name} ({text.coverage})" if text.coverage else text.name for text in texts]
    return cut_tokens(tokens, names, first_tokens(tokenizer), length)


def load_tokenizer(model: SourceModel) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model.directory(), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # damaged files raise errors of many unrelated kinds
        raise InputError(f"{model.name}: cannot read the tokenizer: {one_line(error)}") from None


def first_tokens(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts in front of every text, or none."""
    first: list[int] = tokenizer("").input_ids
    return first[:1] if first and first[0] == tokenizer.bos_token_id else []


def tokenize(tokenizer: Any, text: Text) -> list[int]:
    """A text's token ids, without special tokens."""
    ids: list[int] = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
    return ids


def cut_tokens(
    tokens: Sequence[Sequence[int]], names: Sequence[str], prefix: Sequence[int], length: int
) -> Cut:
    """Cuts tokenized texts.

    Args:
        tokens: Each text's token ids.
        names: Where each text came from, for the message.
        prefix: Tokens that every window begins with.
        length: Tokens of a window, including ``prefix``.

    Raises:
        InputError: A text is too short.
    """
    length -= len(prefix)
    whole, rest = divmod(length, len(tokens))
    shares = [whole + (index < rest) for index in range(len(tokens))]
    calibration = list(prefix)
    windows = {CALIBRATION: calibration}
    num_tokens = []
    groups = by_text(held_out(len(tokens)))
    for text, name, share, group in zip(tokens, names, shares, groups, strict=True):
        if len(text) < share + length:
            raise InputError(
                f"{name}: the calibration text has {len(text)} tokens, {share + length} expected "
                f"for {share} of the calibration window and a held-out window of {length}; give a "
                "longer text or shorter --lengths"
            )
        calibration += text[:share]
        taken = set(range(share))
        room = len(text) - share - length
        for part, window in enumerate(group):
            start = share + room * (2 * part + 1) // (2 * len(group))
            windows[window] = [*prefix, *text[start : start + length]]
            taken.update(range(start, start + length))
        num_tokens.append(len(taken))
    return Cut(windows, num_tokens)
