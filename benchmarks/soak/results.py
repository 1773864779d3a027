"""Turns a soak's figures into rows."""

from collections import Counter
from collections.abc import Sequence

from benchmarks.soak.checks import (
    FALLBACKS,
    PRODUCTS,
    TOKENS,
    growth_ratio,
    thirds,
)
from benchmarks.soak.plan import LENGTHS
from benchmarks.soak.run import NUM_CLIENTS, Soak, bounds
from vllm_afbs.commands.client import total
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.profile.schema import Profile

GIB = 2**30


def rows_of(
    soak: Soak, profile: Profile, memory_bytes: Sequence[float], seconds: float, num_faults: int
) -> list[Row]:
    """Makes rows of requests by outcome, memory, time to first token, and totals with their bounds.

    Args:
        soak: The finished soak.
        profile: The served profile.
        memory_bytes: The server's memory, sampled once a second.
        seconds: Duration of the soak.
        num_faults: Number of faults of all kinds.
    """
    shape = f"N{len(soak.answers)}-C{NUM_CLIENTS}"

    def single(what: str, value: float, unit: str) -> Row:
        return make_row(what, shape, [value], unit)

    rows = [single("duration", seconds, "seconds"), single("faults", num_faults, "faults")]
    fates = Counter((each.request.kind, each.fate) for each in soak.answers)
    for (kind, fate), number in sorted(fates.items()):
        rows.append(single(f"requests: {kind}, {fate}", number, "requests"))
    rows.append(single("waves without an unsure prompt", soak.num_exact_waves, "waves"))
    for (first, last), _ in LENGTHS:
        waits = [
            each.first_token_seconds
            for each in soak.answers
            if each.first_token_seconds is not None and first <= each.request.num_tokens <= last
        ]
        if waits:
            rows.append(make_row("time to first token", f"L{first}-{last}", waits, "seconds"))
    for name, samples in zip(("second", "last"), thirds(memory_bytes), strict=True):
        gib = [sample / GIB for sample in samples]
        rows.append(make_row(f"memory, {name} third", shape, gib, "GiB"))
    rows.append(single("memory, growth of the median", growth_ratio(memory_bytes), "ratio"))
    return rows + _totals(soak, profile, shape)


def _totals(soak: Soak, profile: Profile, shape: str) -> list[Row]:
    sure, possible = bounds(soak.answers, profile)
    figures = [
        ("prefill tokens", total(soak.grown, TOKENS), sure.tokens, possible.tokens, "tokens"),
        (
            "block products",
            total(soak.grown, PRODUCTS),
            sum(sure.products),
            sum(possible.products),
            "block products",
        ),
    ]
    for reason in sorted(possible.fallbacks):
        counted = total(soak.grown, FALLBACKS, reason=reason)
        least, most = sure.fallbacks[reason], possible.fallbacks[reason]
        figures.append((f"fallbacks, {reason}", counted, least, most, "prefills"))
    rows = []
    for what, counted, least, most, unit in figures:
        for column, value in (("counted", counted), ("at least", least), ("at most", most)):
            rows.append(make_row(f"{what}: {column}", shape, [value], unit))
    skipped = total(soak.grown, PRODUCTS, outcome="skipped")
    products = total(soak.grown, PRODUCTS)
    rows.append(make_row("block products skipped", shape, [skipped / products], "ratio"))
    undecided = total(soak.grown, FALLBACKS, reason="dense_is_faster")
    rows.append(make_row("fallbacks, dense_is_faster: counted", shape, [undecided], "prefills"))
    return rows
