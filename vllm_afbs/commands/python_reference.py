"""A long text that every machine with Python has: the language reference behind ``help()``."""

from dataclasses import dataclass
from pydoc_data.topics import topics

HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Parts:
    """Two texts without a paragraph in common.

    Attributes:
        calibration: What the demo tunes on.
        held_out: What the demo's prompt is cut from, and what the evaluation measures on.
    """

    calibration: str
    held_out: str


def python_reference() -> Parts:
    """Python's language reference in two parts, to calibrate on and to measure on.

    Topics repeat each other's sections, so every paragraph is kept where it comes first, longest
    topic first: what is read there is the most coherent.
    """
    paragraphs: dict[str, str] = {}
    for topic in sorted(topics.values(), key=lambda text: (-len(text), text)):
        for paragraph in topic.split("\n\n"):
            if words := " ".join(paragraph.split()):
                paragraphs.setdefault(words, paragraph.strip("\n"))
    unique = list(paragraphs.values())
    cut = round(len(unique) * (1 - HELD_OUT_SHARE))
    return Parts("\n\n".join(unique[:cut]) + "\n", "\n\n".join(unique[cut:]) + "\n")
