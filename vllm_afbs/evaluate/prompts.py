"""Retrieval tasks brought to a length, as token ids in the model's chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_afbs.evaluate.retrieval import KINDS, Maker, Task


@dataclass(frozen=True)
class Prompt:
    """A finished prompt.

    Attributes:
        task: Its kind's name.
        depth: Where its fact lies; kinds without one take turns through the same values.
        tokens: Token ids, the chat template's included.
        answers: See ``Task``.
        num_tokens: See ``Task``.
    """

    task: str
    depth: float
    tokens: list[int]
    answers: tuple[str, ...]
    num_tokens: int

    def score(self, answer: str) -> float:
        """Share of the expected strings in an answer, case aside."""
        return sum(each.lower() in answer.lower() for each in self.answers) / len(self.answers)


def make_prompts(
    tokenizer: Any, text: str, length: int, per_kind: int, seed: int, kinds: Sequence[str]
) -> list[Prompt]:
    """Prompts of every kind, their facts evenly from the beginning to the end.

    Args:
        tokenizer: The model's.
        text: What fills them.
        length: Tokens of a prompt and its answer together, at most.
        per_kind: Prompts of a kind.
        seed: Of what is drawn.
        kinds: Names out of ``KINDS``.

    Raises:
        ValueError: There is no room for the facts, or the text has too few words.
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
    """A version of a task that nearly fills the room; it grows almost evenly with its filling.

    Raises:
        ValueError: Not even its facts have room.
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
    """Token ids of the prompt, in the model's chat template where it has one."""
    content = task.content(num_units)
    if tokenizer.chat_template:
        message = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + task.opening, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = tokenizer(f"{content}\n{task.opening}", verbose=False).input_ids
    return list(ids)
