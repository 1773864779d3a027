"""Counts and logs the prefills that layers leave to vLLM's dense backend."""

import functools
import logging
from collections.abc import Mapping

from vllm_afbs.observability import metrics
from vllm_afbs.serving.reasons import KINDS, Reason

logger = logging.getLogger("vllm.afbs")

_SEEN_IN_STEPS = {reason for reason, kind in KINDS.items() if kind == "changing"}
# These reasons are fixed, but a layer may learn of them only when it runs.
_SEEN_IN_STEPS |= {"output_quantization", "unknown_argument", "cache_layout"}


def count(reasons: Mapping[Reason, int]) -> None:
    """Adds the prefills that one layer left dense in one step, by reason.

    The first prefill of a reason that no layer's plan can know is logged here. The other reasons
    are logged with the plans.
    """
    for reason, number in reasons.items():
        if number:
            metrics.DENSE_FALLBACKS.inc(number, reason)
            if reason in _SEEN_IN_STEPS:
                _log_first(reason)


@functools.cache
def _log_first(reason: Reason) -> None:
    logger.warning("A prefill runs dense: %s. Others of this reason are only counted.", reason)
