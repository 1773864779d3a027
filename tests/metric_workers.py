"""What a worker counts, in a process of its own, without vLLM, which takes seconds to import."""

import multiprocessing
import os
from collections.abc import Callable

from vllm_afbs.observability import fallbacks, metrics


def count() -> None:
    """One worker's numbers, which ``tests/test_metrics.py`` knows."""
    metrics.count_products(3, [4, 6], 20, range(2, 4))
    fallbacks.count({"short_context": 2, "dense_is_faster": 0})
    for seconds in (0.002, 0.02, 20.0):
        metrics.PREFILL_ATTENTION_SECONDS.observe(seconds, "sparse")


def count_unprivileged() -> None:
    """The same by a user who may do nothing here, and whose server goes on."""
    os.setuid(65534)
    metrics.publish()
    count()
    count()


def run(target: Callable[[], None], number: int = 1) -> None:
    """Runs workers of this process's server one after the other."""
    for _ in range(number):
        process = multiprocessing.get_context("spawn").Process(target=target)
        process.start()
        process.join()
        assert process.exitcode == 0
