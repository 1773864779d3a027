"""Retrieval prompts with known answers: passkey, and the tasks of RULER. No download is needed.

RULER defines the tasks (arXiv 2404.06654, section 3 and appendix B); the wording and the words are
our own. They are needles (*single*, and with several keys, values or queries), *variable tracking*,
*common words* and *frequent words*. *Passkey* is older (arXiv 2305.16300). A prompt consists of an
introduction, filling with facts hidden at a given depth, and a question. As in RULER, the prompt
also contains the beginning of the answer. The score is the share of the expected strings that the
answer contains.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_NUM_NEEDLES = 4
_NUM_HOPS = 4
_COMMON = 10
_TIMES = {4096: (30, 3), 0: (6, 1)}
"""How often common and other words are listed, by the shortest length it applies to."""
_FREQUENT, _CODED_WORDS, _ZETA = 3, 50, 2.0
_SHORTEST_WORD, _LONGEST_WORD = 5, 9


@dataclass(frozen=True)
class Task:
    """A prompt before it is brought to a length.

    Attributes:
        intro: The introduction, before the filling.
        facts: Sentences with their depths in the filling, from 0 to 1, in ascending order.
        fill: Makes a given number of units of filling.
        question: The question, after the filling.
        opening: The beginning of the answer.
        answers: The strings that the answer should contain.
        num_tokens: Most tokens of the answer.
    """

    intro: str
    facts: Sequence[tuple[float, str]]
    fill: Callable[[int], list[str]]
    question: str
    opening: str
    answers: tuple[str, ...]
    num_tokens: int

    def content(self, num_units: int) -> str:
        """The user's message with a number of units of filling."""
        units = self.fill(num_units)
        placed = [(round(depth * len(units)), fact) for depth, fact in self.facts]
        for at, fact in reversed(placed):
            units.insert(at, fact)
        return f"{self.intro}\n{' '.join(units)}\n{self.question}"


class Maker:
    """Makes tasks.

    Args:
        text: The text whose sentences and words fill the prompts.
        length: Tokens of the prompts.
        seed: Seed of all that is drawn at random.
    """

    def __init__(self, text: str, length: int, seed: int) -> None:
        self._often, self._seldom = next(n for least, n in _TIMES.items() if length >= least)
        self._rng = random.Random(seed)
        self._sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
        words = set(re.findall(r"\b[a-z]+\b", text))
        self._words = sorted(w for w in words if _SHORTEST_WORD <= len(w) <= _LONGEST_WORD)

    def passkey(self, depth: float) -> Task:
        """One number in noise."""
        key = self._number(5)
        return Task(
            "There is important information hidden in much irrelevant text. Find and memorise it.",
            [(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")],
            _noise,
            "What is the pass key?",
            "The pass key is",
            (key,),
            24,
        )

    def single_needle(self, depth: float) -> Task:
        """One key with one number, in prose."""
        (key,), (value,) = self._draw(1), self._numbers(1)
        return self._needles([(key, value)], [depth], [key], (value,))

    def multi_key(self, depth: float) -> Task:
        """Several keys, one of which is asked for."""
        keys, values = self._draw(_NUM_NEEDLES), self._numbers(_NUM_NEEDLES)
        depths = [depth, *self._depths(_NUM_NEEDLES - 1)]
        return self._needles(list(zip(keys, values, strict=True)), depths, keys[:1], (values[0],))

    def multi_value(self, depth: float) -> Task:
        """One key with several numbers, all asked for."""
        (key,), values = self._draw(1), self._numbers(_NUM_NEEDLES)
        depths = [depth, *self._depths(_NUM_NEEDLES - 1)]
        return self._needles([(key, value) for value in values], depths, [key], tuple(values))

    def multi_query(self, depth: float) -> Task:
        """Several keys, all asked for."""
        keys, values = self._draw(_NUM_NEEDLES), self._numbers(_NUM_NEEDLES)
        depths = [depth, *self._depths(_NUM_NEEDLES - 1)]
        return self._needles(list(zip(keys, values, strict=True)), depths, keys, tuple(values))

    def variable_tracking(self, depth: float) -> Task:
        """A chain of assignments that begins at the depth and goes on evenly to the end."""
        value = self._number(5)
        names = [self._letters(5).upper() for _ in range(_NUM_HOPS + 1)]
        lines = [f"VAR {names[0]} = {value}."]
        lines += [f"VAR {name} = VAR {before}." for before, name in pairwise(names)]
        places = [depth + (1.0 - depth) * i / _NUM_HOPS for i in range(_NUM_HOPS + 1)]
        return Task(
            "Memorise the chain of variable assignments hidden in the following text.",
            list(zip(places, lines, strict=True)),
            _noise,
            f"Find all variables that are assigned the value {value} in the text above.",
            f"The {_NUM_HOPS + 1} variables that are assigned the value {value} are:",
            tuple(names),
            48,
        )

    def common_words(self, depth: float) -> Task:
        """Ten words that a list repeats often, among many that it repeats seldom."""
        del depth  # the words are spread over the whole list
        common = self._draw(_COMMON)
        others = [word for word in self._words if word not in common]
        others = self._rng.sample(others, len(others))
        seed = self._rng.random()

        def fill(num_units: int) -> list[str]:
            words = (others * (1 + num_units // max(1, len(others))))[:num_units] * self._seldom
            words += list(common) * self._often
            random.Random(seed).shuffle(words)
            return [f"{number}. {word}" for number, word in enumerate(words, start=1)]

        return Task(
            "Below is a numbered list of words. Some words appear more often than others. "
            "Memorise those that appear most often.",
            [],
            fill,
            f"What are the {_COMMON} most common words in the list above?",
            f"The {_COMMON} most common words are:",
            tuple(common),
            80,
        )

    def frequent_words(self, depth: float) -> Task:
        """Made-up words whose frequencies fall off as a zeta distribution's."""
        del depth
        coded = [self._letters(6) for _ in range(_CODED_WORDS)]
        weights = [rank**-_ZETA for rank in range(1, _CODED_WORDS + 1)]
        seed = self._rng.random()

        def fill(num_units: int) -> list[str]:
            counts = [round(num_units * weight / sum(weights)) for weight in weights]
            words = [w for word, count in zip(coded, counts, strict=True) for w in [word] * count]
            random.Random(seed).shuffle(words)
            return words

        return Task(
            "Read the following coded text and track the frequency of each coded word.",
            [],
            fill,
            f"What are the {_FREQUENT} most frequent words in the coded text above?",
            f"The {_FREQUENT} most frequent words are:",
            tuple(coded[:_FREQUENT]),
            48,
        )

    def _needles(
        self,
        needles: Sequence[tuple[str, str]],
        depths: Sequence[float],
        asked: Sequence[str],
        values: tuple[str, ...],
    ) -> Task:
        facts = sorted(
            (depth, f"The special magic number for {key} is {value}.")
            for depth, (key, value) in zip(depths, needles, strict=True)
        )
        names = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        numbers = "number" if len(values) == 1 else "numbers"
        verb = "is" if len(values) == 1 else "are"
        return Task(
            "Some special magic numbers are hidden in the following text. Memorise them.",
            facts,
            self._prose,
            f"What {verb} the special magic {numbers} for {names} given in the text above?",
            f"The special magic {numbers} for {names} {verb}",
            values,
            24 if len(values) == 1 else 64,
        )

    def _prose(self, num_units: int) -> list[str]:
        whole, rest = divmod(num_units, len(self._sentences))
        return self._sentences * whole + self._sentences[:rest]

    def _draw(self, count: int) -> list[str]:
        """Draws words of which none is a part of another: answers are searched for as strings."""
        drawn: list[str] = []
        for word in self._rng.sample(self._words, len(self._words)):
            if not any(word in other or other in word for other in drawn):
                drawn.append(word)
            if len(drawn) == count:
                return drawn
        raise ValueError(f"a text of at least {count} different words expected, got {len(drawn)}")

    def _letters(self, count: int) -> str:
        return "".join(self._rng.choices(ascii_lowercase, k=count))

    def _number(self, digits: int) -> str:
        return str(self._rng.randrange(10 ** (digits - 1), 10**digits))

    def _numbers(self, count: int) -> list[str]:
        numbers: set[str] = set()
        while len(numbers) < count:
            numbers.add(self._number(7))
        return sorted(numbers, key=lambda _: self._rng.random())

    def _depths(self, count: int) -> list[float]:
        return [self._rng.random() for _ in range(count)]


def _noise(num_units: int) -> list[str]:
    whole, rest = divmod(num_units, len(_NOISE))
    return list(_NOISE * whole + _NOISE[:rest])


KINDS: dict[str, Callable[[Maker, float], Task]] = {
    "passkey": Maker.passkey,
    "needle": Maker.single_needle,
    "multi-key needle": Maker.multi_key,
    "multi-value needle": Maker.multi_value,
    "multi-query needle": Maker.multi_query,
    "variable tracking": Maker.variable_tracking,
    "common words": Maker.common_words,
    "frequent words": Maker.frequent_words,
}

WITHOUT_DEPTH = {"common words", "frequent words"}
