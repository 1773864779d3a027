"""Plans the requests of a soak; the same number and seed give the same plan."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_afbs.profile.fingerprint import ModelFingerprint

Kind = Literal["whole", "leave_waiting", "leave_reading", "too_long", "malformed"]
"""Whole: answered to the end. Leave: the client hangs up before or after the first token. The
server must refuse the other two."""

SEED = 8
MAX_MODEL_LEN = 8192
MAX_TOKENS = 8
"""Longest answer that is read to its end."""
LEFT_TOKENS = 200
"""Tokens asked for by clients that hang up: far more than they wait for."""
NUM_WAVES = 11
STRIDE = 4
"""Step from a request's wave to the next request's; coprime to ``NUM_WAVES``."""

LENGTHS = (
    ((1, 1), 0.030),
    ((2, 127), 0.763),
    ((128, 511), 0.060),
    ((512, 2047), 0.022),
    ((2048, 4095), 0.011),
    ((4096, 7167), 0.003),
    ((7168, MAX_MODEL_LEN - LEFT_TOKENS), 0.002),
)
"""First and last length of a class, and its share of all requests."""
SHARE_TOO_LONG = 0.024
"""The requests that remain are malformed."""

SHARE_LEAVE_WAITING = 0.15
"""Share in odd waves. In even waves no client leaves waiting, so their totals are exact."""
SHARE_LEAVE_READING = 0.06
SHARE_STREAMED = 0.5
FILL_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: What the client does, or why the server must refuse the request.
        num_tokens: Length of the prompt; 0 if the body is malformed.
        max_tokens: Tokens of the answer.
        stream: Whether the answer comes token by token.
        where: In [0, 1): chooses the part of the text, the malformed body, and how soon a client
            leaves.
    """

    kind: Kind
    num_tokens: int
    max_tokens: int
    stream: bool
    where: float


def make_plan(num_requests: int, seed: int = SEED) -> list[list[Request]]:
    """Draws the requests and deals them into waves.

    Every wave gets its share of each class of lengths. The longest prompts are in different waves,
    because two of them at once would raise the server's memory. A wave is finished before the next
    begins, so that the server's totals can be read in between.

    Args:
        num_requests: Number of requests in all waves.
        seed: Seed of the draw.
    """
    draw = random.Random(seed)
    kinds: list[tuple[Kind, int]] = []
    for (first, last), share in LENGTHS:
        number = round(share * num_requests)
        kinds += [("whole", draw.randint(first, last)) for _ in range(number)]
    kinds.reverse()  # the longest first
    for _ in range(round(SHARE_TOO_LONG * num_requests)):
        kinds.append(("too_long", draw.randint(MAX_MODEL_LEN, 2 * MAX_MODEL_LEN)))
    kinds += [("malformed", 0)] * (num_requests - len(kinds))
    waves: list[list[Request]] = [[] for _ in range(NUM_WAVES)]
    for index, (kind, length) in enumerate(kinds):
        wave = index * STRIDE % NUM_WAVES
        waves[wave].append(_drawn(draw, kind, length, wave))
    for requests in waves:
        draw.shuffle(requests)
    return waves


def fill(cache_bytes: int, model: ModelFingerprint) -> list[Request]:
    """A wave that writes to the whole KV cache, which frees its pages in the order it takes them.

    A page becomes resident when it is first written to, so memory would grow for as long as short
    prompts leave the ends of pages alone.

    Args:
        cache_bytes: Of the cache, in fp32.
        model: What it is for.
    """
    token_bytes = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim
    number = math.ceil(cache_bytes / (token_bytes * FILL_TOKENS))
    return [Request("whole", FILL_TOKENS, 1, stream=False, where=i / number) for i in range(number)]


def _drawn(draw: random.Random, kind: Kind, num_tokens: int, wave: int) -> Request:
    if kind == "whole":
        chance = draw.random()
        leave_waiting = SHARE_LEAVE_WAITING * (wave % 2)
        if chance < leave_waiting:
            kind = "leave_waiting"
        elif chance < leave_waiting + SHARE_LEAVE_READING:
            kind = "leave_reading"
    leaves = kind in ("leave_waiting", "leave_reading")
    max_tokens = LEFT_TOKENS if leaves else draw.randint(1, MAX_TOKENS)
    stream = kind == "leave_reading" or draw.random() < SHARE_STREAMED
    return Request(kind, num_tokens, max_tokens, stream, draw.random())


def most_tokens_at_once(waves: Sequence[Sequence[Request]], num_clients: int) -> int:
    """Computes the most tokens that one step can hold: the longest prompts of a wave together.

    There are no more requests at a time than clients, and a request that is being answered adds one
    token instead of its prompt.
    """
    computed = [[r.num_tokens for r in wave if r.kind != "too_long"] for wave in waves]
    return max(sum(sorted(lengths)[-num_clients:]) for lengths in computed) + num_clients


def describe(waves: Sequence[Sequence[Request]], seed: int = SEED) -> list[str]:
    """Describes the plan in lines for the terminal."""
    requests = [request for wave in waves for request in wave]
    kinds = Counter(request.kind for request in requests)
    answered = [r for r in requests if r.kind not in ("too_long", "malformed")]
    classes = [
        f"{first}-{last}: {sum(first <= r.num_tokens <= last for r in answered)}"
        for (first, last), _ in LENGTHS
    ]
    return [
        f"{len(requests)} requests in {len(waves)} waves, seed {seed}: "
        + ", ".join(f"{number} {kind}" for kind, number in kinds.items()),
        f"prompts by tokens: {', '.join(classes)}; "
        f"{sum(r.num_tokens for r in answered)} tokens in all",
    ]
