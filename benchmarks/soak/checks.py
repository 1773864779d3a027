"""Checks a server's counters and memory against what the requests alone must give.

The server computes every prompt in one step: without chunks, prefix cache or preemption. The
prompts' lengths then determine all counters, and no code of the backend is used here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from vllm_afbs.commands.client import Counters, total
from vllm_afbs.profile.schema import Profile

MAX_GROWTH_RATIO = 0.02
"""Largest growth of the median memory from the second third of a run to the last. In the first
third the KV cache is filled (``plan.fill``) and the allocator reaches its size."""

TOKENS = "vllm_afbs_prefill_tokens_total"
PRODUCTS = "vllm_afbs_block_products_total"
FALLBACKS = "vllm_afbs_dense_fallbacks_total"


@dataclass(frozen=True)
class Expected:
    """Totals over a server's layers that prompts of given lengths must give.

    Attributes:
        tokens: Query tokens of prefills.
        long_tokens: Query tokens that sparse layers may run sparse.
        products: Block products, ``[num_layers]``.
        fallbacks: Prefills left to vLLM's dense backend, by reason. ``dense_is_faster`` is left
            out: it depends on a prompt's content, not on its length.
    """

    tokens: int
    long_tokens: int
    products: tuple[int, ...]
    fallbacks: Counter[str]


def expect(lengths: Iterable[int], profile: Profile) -> Expected:
    """Adds up what a server must count for prompts of these lengths, in shared steps or not."""
    num_layers = len(profile.layers)
    level = profile.level_index()
    num_sparse = sum(profile.layers[index].levels[level].is_sparse for index in profile.full_layers)
    tokens = long_tokens = blocks = 0
    fallbacks: Counter[str] = Counter()
    for length in lengths:
        if length == 1:  # one row has the shape of a decode and is not counted as a prefill
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
    products = tuple(
        2 * profile.model.num_heads * blocks if layer.levels else 0 for layer in profile.layers
    )
    return Expected(tokens, long_tokens, products, +fallbacks)


def visible_blocks(length: int, block_q: int, block_k: int) -> int:
    """Counts the blocks that one head's causal attention to a whole prompt computes.

    A query block's last row ``r`` sees keys 0 to r, so it reaches ``r // block_k + 1`` blocks.
    """
    last_rows = (min(start + block_q, length) - 1 for start in range(0, length, block_q))
    return sum(row // block_k + 1 for row in last_rows)


def count_faults(grown: Counters, sure: Expected, possible: Expected) -> list[str]:
    """Compares the growth of a server's counters with the expected totals, a line for each fault.

    Args:
        grown: How much every counter grew.
        sure: Totals of the prompts that were certainly computed.
        possible: Totals of these and of the prompts that may have been computed, because their
            clients hung up early.
    """
    faults = []

    def compare(what: str, counted: float, least: float, most: float) -> None:
        if not least <= counted <= most:
            bounds = f"{least:g}" if least == most else f"{least:g} to {most:g}"
            faults.append(f"{what}: {bounds} expected, {counted:g} counted")

    compare("prefill tokens", total(grown, TOKENS), sure.tokens, possible.tokens)
    # The backend runs a long prompt dense if its selection keeps nearly everything.
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
    """Returns the second and the last third of a run's samples."""
    first, second = len(samples) // 3, 2 * len(samples) // 3
    return samples[first:second], samples[second:]


def growth_ratio(samples: Sequence[float]) -> float:
    """Computes how far the median of the last third lies above that of the second, as a ratio.

    Raises:
        ValueError: There are fewer than three samples.
    """
    if len(samples) < 3:
        raise ValueError(f"at least 3 samples expected, got {len(samples)}")
    second, last = thirds(samples)
    return median(last) / median(second) - 1


def memory_faults(samples: Sequence[float]) -> list[str]:
    """Reports, in one line, memory that grew by more than ``MAX_GROWTH_RATIO``."""
    growth = growth_ratio(samples)
    if growth <= MAX_GROWTH_RATIO:
        return []
    return [f"memory: grew by {growth:.1%} in the last third, {MAX_GROWTH_RATIO:.0%} allowed"]
