"""Metrics: written by the workers, shown on the API server's ``/metrics``.

Attention runs in worker processes and ``/metrics`` in another. A worker writes its numbers into
files of prometheus-client's multi-process format, in one of two directories:

* ``PROMETHEUS_MULTIPROC_DIR`` where it is set (vLLM sets it for several API servers): vLLM's own
  collector reads every file there.
* otherwise ``VLLM_AFBS_METRICS_DIR``, which the first process of a server names and its workers
  inherit; a collector that ``publish`` registers reads it.
"""

import atexit
import functools
import os
import secrets
import shutil
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_afbs.profile import Profile

DIRECTORY_VARIABLE = "VLLM_AFBS_METRICS_DIR"
_LOCK = threading.Lock()
SECONDS_BUCKETS = (
    1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, float("inf"),
)  # fmt: skip


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
    """A number that only grows; workers' numbers are added up."""

    def inc(self, amount: float, *labels: str) -> None:
        """Adds to the counter of these label values."""
        _add(_file("counter"), self._key("_total", labels), amount)


class Histogram(_Metric):
    """A distribution of seconds."""

    def observe(self, seconds: float, *labels: str) -> None:
        """Adds one observation."""
        file = _file("histogram")
        bound = SECONDS_BUCKETS[bisect_left(SECONDS_BUCKETS, seconds)]
        _add(file, self._key("_bucket", labels, le=floatToGoString(bound)), 1.0)
        _add(file, self._key("_sum", labels), seconds)


class Gauge(_Metric):
    """A state; of several workers the largest value is shown."""

    def set(self, value: float, *labels: str) -> None:
        """Replaces the value of these label values."""
        _file("gauge_max").write_value(self._key("", labels), value, 0.0)


BLOCK_PRODUCTS = Counter(
    "vllm_afbs_block_products",
    "Block products (QK^T and PV) of calibrated-length prefills, per layer and outcome.",
    ("layer", "outcome"),
)
DENSE_FALLBACKS = Counter(
    "vllm_afbs_dense_fallbacks",
    "Prefills that a layer left to the dense parent, by reason.",
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
PROFILE_LOADED = Gauge("vllm_afbs_profile_loaded", "1 if a profile is served, 0 if not.")
PROFILE_INFO = Gauge(
    "vllm_afbs_profile_info",
    "1, labelled with the served profile.",
    ("profile_id", "model", "tolerance", "created_at"),
)


def count_fallbacks(reasons: Mapping[str, int]) -> None:
    """Adds the prefills that a layer left to the dense parent in one step."""
    for reason, count in reasons.items():
        if count:
            DENSE_FALLBACKS.inc(count, reason)


def count_products(layer: int, num_kept: int, num_blocks: int) -> None:
    """Adds a layer's block products of one step.

    Args:
        layer: Index of the decoder layer.
        num_kept: Blocks computed; each is a product QK^T and a product PV.
        num_blocks: Blocks that dense causal attention computes.
    """
    if num_blocks:
        BLOCK_PRODUCTS.inc(2 * num_kept, str(layer), "computed")
        BLOCK_PRODUCTS.inc(2 * (num_blocks - num_kept), str(layer), "skipped")


def report_profile(profile: Profile | None) -> None:
    """Shows which profile a worker serves."""
    PROFILE_LOADED.set(float(profile is not None))
    if profile is not None:
        PROFILE_INFO.set(
            1.0,
            profile.profile_id,
            profile.model_name,
            f"{profile.tuner.tolerance:g}",
            profile.tuner.created_at,
        )


def publish() -> None:
    """Names the directory for this process and its children, and shows it on ``/metrics``.

    Repeated calls change nothing.
    """
    if DIRECTORY_VARIABLE not in os.environ:
        # Named here, made by the first worker that writes: most processes that import vLLM never
        # serve. The random part keeps others from making it first.
        directory = Path(tempfile.gettempdir()) / f"vllm-afbs-{secrets.token_hex(8)}"
        os.environ[DIRECTORY_VARIABLE] = str(directory)
        atexit.register(_remove_if_owner, directory, os.getpid())
    if not any(isinstance(known, _DirectoryCollector) for known in REGISTRY._collector_to_names):
        REGISTRY.register(_DirectoryCollector())


class _DirectoryCollector(Collector):
    """Adds up the files of all workers of this server."""

    def collect(self) -> Iterable[Metric]:
        files = Path(os.environ[DIRECTORY_VARIABLE]).glob("*.db")
        return list(MultiProcessCollector.merge([str(file) for file in files]))

    def describe(self) -> Iterable[Metric]:
        return []


def _remove_if_owner(directory: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker runs its parent's exit handlers too
        shutil.rmtree(directory, ignore_errors=True)


def _add(file: MmapedDict, key: str, amount: float) -> None:
    with _LOCK:  # on CUDA a thread reports what the device has finished
        file.write_value(key, file.read_value(key)[0] + amount, 0.0)


def _file(kind: str) -> MmapedDict:
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ[DIRECTORY_VARIABLE]
    return _open(directory, kind, os.getpid())


@functools.cache
def _open(directory: str, kind: str, pid: int) -> MmapedDict:
    Path(directory).mkdir(mode=0o700, exist_ok=True)
    # The process may have files of prometheus-client's own there, so ours are named apart.
    return MmapedDict(str(Path(directory) / f"{kind}_afbs-{pid}.db"))
