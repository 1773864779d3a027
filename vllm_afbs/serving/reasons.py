"""Why a prefill runs dense: every reason that there is, counted each time and logged once.

The operator's page and the Prometheus rules name the same reasons, of the same kinds; a test
compares them with this list, and mypy every use with ``Reason``.
"""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Literal

from vllm_afbs.observability import metrics

logger = logging.getLogger("vllm.afbs")

Kind = Literal["chosen", "changing", "fixed"]
"""Chosen: by the dispatcher, the profile or the operator. Fixed: what a layer is or how the server
was started, so true of all its prefills or of none. Changing: of the requests."""

Reason = Literal[
    "short_query",
    "short_context",
    "dense_is_faster",
    "profile_dense",
    "no_profile",
    "disabled",
    "long_context",
    "attention_mask",
    "unknown_lengths",
    "flash_attention_version",
    "kv_cache_dtype",
    "page_size",
    "block_size",
    "context_parallel",
    "batch_invariant",
    "lora",
    "sleep_mode",
    "output_quantization",
    "sliding_window",
    "softcap",
    "alibi",
    "sinks",
    "attention_type",
    "kv_sharing",
    "head_shape",
    "unknown_layer",
    "unknown_argument",
]

KINDS: dict[Reason, Kind] = {
    "short_query": "chosen",
    "short_context": "chosen",
    "dense_is_faster": "chosen",
    "profile_dense": "chosen",
    "no_profile": "chosen",
    "disabled": "chosen",
    "long_context": "changing",
    "attention_mask": "changing",
    "unknown_lengths": "changing",
    "flash_attention_version": "fixed",
    "kv_cache_dtype": "fixed",
    "page_size": "fixed",
    "block_size": "fixed",
    "context_parallel": "fixed",
    "batch_invariant": "fixed",
    "lora": "fixed",
    "sleep_mode": "fixed",
    "output_quantization": "fixed",
    "sliding_window": "fixed",
    "softcap": "fixed",
    "alibi": "fixed",
    "sinks": "fixed",
    "attention_type": "fixed",
    "kv_sharing": "fixed",
    "head_shape": "fixed",
    "unknown_layer": "fixed",
    "unknown_argument": "fixed",
}

_SEEN_IN_STEPS = {reason for reason, kind in KINDS.items() if kind == "changing"}
# Fixed, but a layer is not told before it runs.
_SEEN_IN_STEPS.add("output_quantization")


def count(reasons: Mapping[Reason, int]) -> None:
    """Adds the prefills that a layer left to the dense parent in one step.

    The first of a reason that no plan of a layer can know is logged; others are with the plan.
    """
    metrics.count_fallbacks({str(reason): number for reason, number in reasons.items()})
    for reason, number in reasons.items():
        if number and reason in _SEEN_IN_STEPS:
            _log_first(reason)


@functools.cache
def _log_first(reason: Reason) -> None:
    logger.warning("A prefill runs dense: %s. Others of this reason are only counted.", reason)


def log_layers(reasons: Iterable[tuple[str, Reason | None]]) -> None:
    """Logs which layers run dense for good, one line for each reason.

    Args:
        reasons: Names of layers, each with its reason; None if it may run sparse.
    """
    layers: dict[Reason, list[str]] = {}
    for name, reason in reasons:
        if reason is not None and reason != "no_profile":  # said once, when it was looked for
            layers.setdefault(reason, []).append(name)
    for reason, names in layers.items():
        level = logging.WARNING if KINDS[reason] == "fixed" else logging.INFO
        logger.log(
            level, "%d layers run dense: %s (%s to %s).", len(names), reason, names[0], names[-1]
        )
