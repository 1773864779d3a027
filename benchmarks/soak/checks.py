"""What a server's counters and memory must be, reckoned from the requests alone.

The server is started so that a prompt is one step's (no chunks, no prefix cache, no preemption).
Then its lengths say everything: nothing here looks at what the backend calls a block.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from vllm_afbs.commands.client import Counters, total
from vllm_afbs.profile.schema import Profile

MAX_GROWTH_RATIO = 0.02
"""Of the memory's median over the last third of a run to that over the second third. In the first
one the KV cache is filled (``plan.fill``), and the allocator comes to what it needs."""

TOKENS = "vllm_afbs_prefill_tokens_total"
PRODUCTS = "vllm_afbs_block_products_total"
FALLBACKS = "vllm_afbs_dense_fallbacks_total"


@dataclass(frozen=True)
class Expected:
    """Totals over a server's layers that prompts of some lengths come to.

    Attributes:
        tokens: Query tokens of prefills.
        long_tokens: Of them, those that sparse layers may run sparse.
        products: Block products, ``[num_layers]``.
        fallbacks: Prefills left to the dense parent by reason; ``dense_is_faster`` depends on
            what a prompt says, not on its length, and is not among them.
    """

    tokens: int
    long_tokens: int
    products: tuple[int, ...]
    fallbacks: Counter[str]


def expect(lengths: Iterable[int], profile: Profile) -> Expected:
    """Adds up what prompts of these lengths, each in a step of its own or not, must count."""
    num_layers = len(profile.layers)
    num_sparse = sum(layer.is_sparse for layer in profile.layers)
    tokens = long_tokens = blocks = 0
    fallbacks: Counter[str] = Counter()
    for length in lengths:
        if length == 1:  # one row is a decode's shape, and not counted as a prefill
            continue
        tokens += length * num_layers
        if length < profile.block_q:
            fallbacks["short_query"] += num_layers
        elif length < profile.min_seq_len:
            fallbacks["short_context"] += num_layers
        elif length > profile.max_seq_len:
            fallbacks["long_context"] += num_layers
        else:
            fallbacks["profile_dense"] += num_layers - num_sparse
            long_tokens += length * num_sparse
            blocks += visible_blocks(length, profile.block_q, profile.block_k)
    # Each block is a product QK^T and a product PV.
    products = tuple(2 * len(layer.heads) * blocks for layer in profile.layers)
    return Expected(tokens, long_tokens, products, +fallbacks)


def visible_blocks(length: int, block_q: int, block_k: int) -> int:
    """Blocks that one head's causal attention to a whole prompt computes.

    A query block's last row ``r`` sees keys 0 to r, so it reaches ``r // block_k + 1`` blocks.
    """
    last_rows = (min(start + block_q, length) - 1 for start in range(0, length, block_q))
    return sum(row // block_k + 1 for row in last_rows)


def count_faults(grown: Counters, sure: Expected, possible: Expected) -> list[str]:
    """Compares a server's growth with what the requests come to; one line for each difference.

    Args:
        grown: How much every counter grew.
        sure: Of the prompts that were certainly computed.
        possible: Of these and of all others that may have been: whose client hung up early.
    """
    faults = []

    def compare(what: str, counted: float, least: float, most: float) -> None:
        if not least <= counted <= most:
            bounds = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            faults.append(f"{what}: {bounds} expected, {counted:g} counted")

    compare("prefill tokens", total(grown, TOKENS), sure.tokens, possible.tokens)
    # Long prompts whose selection keeps nearly everything run dense, as the backend sees fit.
    sparse = total(grown, TOKENS, path="sparse")
    undecided = total(grown, FALLBACKS, reason="dense_is_faster") > 0
    compare("sparse tokens", sparse, 0 if undecided else sure.long_tokens, possible.long_tokens)
    for layer, (least, most) in enumerate(zip(sure.products, possible.products, strict=True)):
        counted = total(grown, PRODUCTS, layer=str(layer))
        compare(f"block products of layer {layer}", counted, least, most)
    counted_reasons = {dict(labels)["reason"] for name, labels in grown if name == FALLBACKS}
    for reason in sorted((counted_reasons | possible.fallbacks.keys()) - {"dense_is_faster"}):
        counted = total(grown, FALLBACKS, reason=reason)
        least, most = sure.fallbacks[reason], possible.fallbacks[reason]
        compare(f"fallbacks, {reason}", counted, least, most)
    return faults


def thirds(samples: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The second and the last third of a run's samples."""
    first, second = len(samples) // 3, 2 * len(samples) // 3
    return samples[first:second], samples[second:]


def growth_ratio(samples: Sequence[float]) -> float:
    """By how much the median of the last third lies above that of the second third.

    Raises:
        ValueError: There are fewer than three samples.
    """
    if len(samples) < 3:
        raise ValueError(f"at least 3 samples expected, got {len(samples)}")
    second, last = thirds(samples)
    return median(last) / median(second) - 1


def memory_faults(samples: Sequence[float]) -> list[str]:
    """Says, in one line, if memory grew by more than ``MAX_GROWTH_RATIO``."""
    growth = growth_ratio(samples)
    if growth <= MAX_GROWTH_RATIO:
        return []
    return [f"memory: grew by {growth:.1%} in the last third, {MAX_GROWTH_RATIO:.0%} allowed"]
