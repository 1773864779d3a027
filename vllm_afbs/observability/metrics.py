"""The metrics: workers write them, and the API server shows them on ``/metrics``.

This module says what is measured. ``instance`` says in which directory the numbers lie, and
``metric_files`` how they are written and read.
"""

import functools
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_afbs.observability import instance, metric_files
from vllm_afbs.profile.schema import Profile

_Given = ParamSpec("_Given")
SECONDS_BUCKETS = (
    1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, float("inf"),
)  # fmt: skip
ERROR_BUCKETS = (
    1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 7e-2, 0.1, 0.15, 0.2, 0.5, 1.0, float("inf"),
)  # fmt: skip


def _reporting(report: Callable[_Given, None]) -> Callable[_Given, None]:
    """Lets one thread report at a time. If nothing can be written, the report is lost."""

    @functools.wraps(report)
    def reported(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        if not metric_files.may_write():
            return
        try:
            with metric_files.LOCK:
                report(*args, **kwargs)
        except OSError as error:
            metric_files.report_failure(error)

    return reported


@dataclass(frozen=True)
class _Metric:
    """A metric by its exposition name, without the ``_total`` of counters."""

    name: str
    help: str
    labels: tuple[str, ...] = ()

    @functools.cache  # noqa: B019 - metrics live as long as the process
    def _key(self, suffix: str, labels: tuple[str, ...], **more: str) -> str:
        names = (*self.labels, *more)
        values = (*labels, *more.values())
        return mmap_key(self.name, self.name + suffix, list(names), list(values), self.help)


class Counter(_Metric):
    """A number that only grows. ``/metrics`` shows the sum over all workers."""

    @_reporting
    def inc(self, amount: float, *labels: str) -> None:
        """Adds to the counter with these label values."""
        metric_files.open_file("counter").add(self._key("_total", labels), amount)


@dataclass(frozen=True)
class Histogram(_Metric):
    """A distribution.

    Attributes:
        buckets: Upper bounds, the last one infinite.
    """

    buckets: tuple[float, ...] = SECONDS_BUCKETS

    @_reporting
    def observe(self, value: float, *labels: str) -> None:
        """Adds one observation."""
        file, keys = metric_files.open_file("histogram"), self._bucket_keys(labels)
        # Prometheus computes no quantile of a histogram without an infinite bucket.
        file.enter(keys)
        file.add(keys[bisect_left(self.buckets, value)], 1.0)
        file.add(self._key("_sum", labels), value)

    @functools.cache  # noqa: B019 - metrics live as long as the process
    def _bucket_keys(self, labels: tuple[str, ...]) -> list[str]:
        bounds = map(floatToGoString, self.buckets)
        return [self._key("_bucket", labels, le=bound) for bound in bounds]


class Gauge(_Metric):
    """A number that can rise and fall. ``/metrics`` shows the largest of all workers."""

    @_reporting
    def set(self, value: float, *labels: str) -> None:
        """Sets the gauge with these label values."""
        metric_files.open_file("gauge_max").write(self._key("", labels), value, time.time())


BLOCK_PRODUCTS = Counter(
    "vllm_afbs_block_products",
    "Block products (QK^T and PV) of calibrated-length prefills, per layer and outcome.",
    ("layer", "outcome"),
)
HEAD_BLOCK_PRODUCTS = Counter(
    "vllm_afbs_head_block_products",
    "Block products of calibrated-length prefills, per layer, query head and outcome.",
    ("layer", "head", "outcome"),
)
PREFILL_TOKENS = Counter(
    "vllm_afbs_prefill_tokens",
    "Query tokens of prefills, summed over layers, by the path their attention took.",
    ("path",),
)
DENSE_ESTIMATE_SECONDS = Counter(
    "vllm_afbs_dense_estimate_seconds",
    "Estimate of what dense attention would have taken for the steps of path sparse.",
)
SAMPLED_ERROR = Histogram(
    "vllm_afbs_sampled_error",
    "Relative L1 of a layer's sparse attention against dense, in sampled steps.",
    ("layer",),
    ERROR_BUCKETS,
)
DENSE_FALLBACKS = Counter(
    "vllm_afbs_dense_fallbacks",
    "Prefills that a layer left to vLLM's dense backend, by reason.",
    ("reason",),
)
PREFILL_ATTENTION_SECONDS = Histogram(
    "vllm_afbs_prefill_attention_seconds",
    "Attention of one layer in one step that has prefills, selection included.",
    ("path",),
)
SELECTOR_SECONDS = Histogram(
    "vllm_afbs_selector_seconds", "Block selection and list building of one layer in one step."
)
ENABLED = Gauge(
    "vllm_afbs_enabled",
    "1 if layers of any worker may run sparse, 0 if the kill switch makes every prefill dense.",
)
LEVEL = Gauge(
    "vllm_afbs_level",
    "1 for the profile's level that is served, 0 for its others; two are 1 if workers differ.",
    ("level",),
)
PROFILE_LOADED = Gauge("vllm_afbs_profile_loaded", "1 if a profile is served, 0 if not.")
PROFILE_INFO = Gauge(
    "vllm_afbs_profile_info",
    "1, labelled with the served profile.",
    ("profile_id", "model", "tolerance", "created_at", "weights"),
)

LAYERS = Gauge(
    "vllm_afbs_layers",
    "Layers of the profile's model; all other metrics are of those with full attention.",
    ("attention",),
)


def count_tokens(path: str, count: int) -> None:
    """Adds query tokens of prefills whose attention took one path, ``sparse`` or ``dense``."""
    if count:
        PREFILL_TOKENS.inc(count, path)


def count_products(
    layer: int, num_kept: Sequence[int], num_blocks: int, heads: Sequence[int] | None = None
) -> None:
    """Adds a layer's block products of one step.

    Args:
        layer: Index of the decoder layer.
        num_kept: Number of computed blocks by query head. Each has a product QK^T and a product PV.
        num_blocks: Number of blocks that dense causal attention computes for one head.
        heads: Indices of the heads; None to count only the layer as a whole.
    """
    if not num_blocks:
        return
    total = sum(num_kept)
    BLOCK_PRODUCTS.inc(2 * total, str(layer), "computed")
    BLOCK_PRODUCTS.inc(2 * (len(num_kept) * num_blocks - total), str(layer), "skipped")
    for head, kept in zip(heads or (), num_kept if heads else (), strict=True):
        HEAD_BLOCK_PRODUCTS.inc(2 * kept, str(layer), str(head), "computed")
        HEAD_BLOCK_PRODUCTS.inc(2 * (num_blocks - kept), str(layer), str(head), "skipped")


def report_profile(profile: Profile | None, weights: str = "unknown") -> None:
    """Shows which profile a worker serves.

    Args:
        profile: The admitted profile, if any.
        weights: Whether the model has the weights that it was tuned on; see ``profile.weights``.
    """
    PROFILE_LOADED.set(float(profile is not None))
    if profile is not None:
        num_full = len(profile.full_layers)
        LAYERS.set(num_full, "full")
        LAYERS.set(len(profile.layers) - num_full, "other")
        PROFILE_INFO.set(
            1.0,
            profile.profile_id,
            profile.model_name,
            f"{profile.tuner.tolerance:g}",
            profile.tuner.created_at,
            weights,
        )


def publish() -> None:
    """Names the server's directory for this process and its children, and shows its metrics.

    The first process of a server removes the files of ended processes from a directory that has
    been used before. Repeated calls change nothing.
    """
    if instance.start():
        metric_files.remove_files_of_the_dead()
    metric_files.tolerate_damaged_files()
    if not any(isinstance(known, _DirectoryCollector) for known in REGISTRY._collector_to_names):
        REGISTRY.register(_DirectoryCollector())


class _DirectoryCollector(Collector):
    """Shows the metrics that the workers of this server wrote."""

    def collect(self) -> Iterable[Metric]:
        return metric_files.read()

    def describe(self) -> Iterable[Metric]:
        return []
