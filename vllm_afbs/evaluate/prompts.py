"""Retrieval tasks as prompts of a given length: token ids in the model's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_afbs.evaluate.retrieval import KINDS, Maker, Task


@dataclass(frozen=True)
class Prompt:
    """A finished prompt.

    Attributes:
        task: Name of its kind.
        depth: Where its fact lies, from 0 to 1; kinds without a place take the same values in turn.
        tokens: Token ids, including the chat template's.
        answers: See ``Task``.
        num_tokens: See ``Task``.
    """

    task: str
    depth: float
    tokens: list[int]
    answers: tuple[str, ...]
    num_tokens: int

    def score(self, answer: str) -> float:
        """Share of the expected strings that an answer contains, ignoring case."""
        return sum(each.lower() in answer.lower() for each in self.answers) / len(self.answers)


def make_prompts(
    tokenizer: Any, text: str, length: int, per_kind: int, seed: int, kinds: Sequence[str]
) -> list[Prompt]:
    """Makes prompts of every kind, with facts at evenly spaced depths.

    Args:
        tokenizer: The model's tokenizer.
        text: The text that fills the prompts.
        length: Most tokens of a prompt and its answer together.
        per_kind: Number of prompts of each kind.
        seed: Seed of all that is drawn at random.
        kinds: Names from ``KINDS``.

    Raises:
        ValueError: The facts do not fit into the length, or the text has too few words.
    """
    maker = Maker(text, length, seed)
    prompts = []
    for kind in kinds:
        for index in range(per_kind):
            depth = index / (per_kind - 1) if per_kind > 1 else 0.5
            task = KINDS[kind](maker, depth)
            tokens = _fitted(tokenizer, task, length - task.num_tokens)
            prompts.append(Prompt(kind, depth, tokens, task.answers, task.num_tokens))
    return prompts


_FULL = 0.98
_FIRST_UNITS = 64


def _fitted(tokenizer: Any, task: Task, room: int) -> list[int]:
    """Adds filling to a task until it takes nearly all of the room.

    The number of tokens grows almost linearly with the units of filling, so a few tries suffice.

    Raises:
        ValueError: The task does not fit even without filling.
    """
    bare = _encoded(tokenizer, task, 0)
    if len(bare) > room:
        raise ValueError(f"a prompt of at least {len(bare)} tokens expected, got {room}")
    best, num_units, tried = bare, _FIRST_UNITS, set[int]()
    while len(best) < _FULL * room and num_units not in tried:
        tried.add(num_units)
        tokens = _encoded(tokenizer, task, num_units)
        if len(best) < len(tokens) <= room:
            best = tokens
        per_unit = max(1, len(tokens) - len(bare)) / num_units
        num_units = max(1, int((1 + _FULL) / 2 * (room - len(bare)) / per_unit))
    return best


def _encoded(tokenizer: Any, task: Task, num_units: int) -> list[int]:
    """Encodes the prompt, in the model's chat template if it has one."""
    content = task.content(num_units)
    if tokenizer.chat_template:
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + task.opening, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = tokenizer(f"{content}\n{task.opening}", verbose=False).input_ids
    return list(ids)
