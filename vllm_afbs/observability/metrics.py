"""The metrics: workers write them, and the API server shows them on ``/metrics``.

Attention runs in worker processes, and ``/metrics`` is served by another. A worker writes its
numbers into files of prometheus-client's multi-process format, in one of two directories:

* ``PROMETHEUS_MULTIPROC_DIR`` if it is set, as vLLM does for several API servers. vLLM's own
  collector reads every file there.
* ``VLLM_AFBS_METRICS_DIR`` otherwise. The first process of a server sets it, and workers inherit
  it. A collector that ``publish`` registers reads it.

A directory that an operator names outlives its server. The next server to start removes the files
of dead processes from it. If the disk is full, numbers are lost but the server goes on.
"""

import atexit
import functools
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

from prometheus_client import REGISTRY, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_afbs.profile.schema import Profile

logger = logging.getLogger("vllm.afbs")

DIRECTORY_VARIABLE = "VLLM_AFBS_METRICS_DIR"
_STARTED_VARIABLE = "VLLM_AFBS_METRICS_STARTED"
"""The first process of a server sets this. Its children then know that they are not the first."""
_Given = ParamSpec("_Given")
_LOCK = threading.Lock()
_FILE_SUFFIX = "_afbs"
"""Tells our files from those that prometheus-client itself may write for the same process."""
_INITIAL_BYTES = 1 << 20  # size of a new file, the same as prometheus-client's
_ENTRY_BYTES = 32  # most bytes of an entry besides its key
SECONDS_BUCKETS = (
    1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, float("inf"),
)  # fmt: skip
ERROR_BUCKETS = (
    1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 7e-2, 0.1, 0.15, 0.2, 0.5, 1.0, float("inf"),
)  # fmt: skip


def _reporting(report: Callable[_Given, None]) -> Callable[_Given, None]:
    """Lets one thread report at a time. If the disk is full, loses the report and logs that once.

    On CUDA, a thread of its own reports what the device has finished. Two threads could open the
    same file twice and overwrite each other's numbers.
    """

    @functools.wraps(report)
    def reported(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        try:
            with _LOCK:
                report(*args, **kwargs)
        except OSError as error:
            _log_once(f"Metrics are not written: {error}.")

    return reported


@functools.cache
def _log_once(message: str) -> None:
    logger.error(message)


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
        _add(_file("counter"), self._key("_total", labels), amount)


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
        file = _file("histogram")
        _add(file, self._bucket_keys(file, labels)[bisect_left(self.buckets, value)], 1.0)
        _add(file, self._key("_sum", labels), value)

    @functools.cache  # noqa: B019 - metrics live as long as the process
    def _bucket_keys(self, file: MmapedDict, labels: tuple[str, ...]) -> list[str]:
        """The keys of the buckets, after entering all of them into the file.

        Prometheus computes no quantile of a histogram without an infinite bucket.
        """
        bounds = map(floatToGoString, self.buckets)
        keys = [self._key("_bucket", labels, le=bound) for bound in bounds]
        for key in keys:
            _add(file, key, 0.0)
        return keys


@dataclass(frozen=True)
class Gauge(_Metric):
    """A number that can rise and fall.

    Attributes:
        mode: Which process's value is shown: ``max`` for the largest one, ``mostrecent`` for the
            one that was set last.
    """

    mode: str = "max"

    @_reporting
    def set(self, value: float, *labels: str) -> None:
        """Sets the gauge with these label values."""
        _write(_file(f"gauge_{self.mode}"), self._key("", labels), value, time.time())


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
    "1 if layers may run sparse, 0 if the kill switch makes every prefill dense.",
    mode="mostrecent",
)
PROFILE_LOADED = Gauge("vllm_afbs_profile_loaded", "1 if a profile is served, 0 if not.")
PROFILE_INFO = Gauge(
    "vllm_afbs_profile_info",
    "1, labelled with the served profile.",
    ("profile_id", "model", "tolerance", "created_at"),
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
    """Names the directory for this process and its children, and shows its metrics.

    If the directory has a name already, the first process of a server removes the files of dead
    processes from it. Repeated calls change nothing.
    """
    if DIRECTORY_VARIABLE not in os.environ:
        # Most processes that import vLLM never serve, so the first worker that writes makes the
        # directory. Its random name keeps other users from making it before.
        directory = Path(tempfile.gettempdir()) / f"vllm-afbs-{secrets.token_hex(8)}"
        os.environ[DIRECTORY_VARIABLE] = str(directory)
        atexit.register(_remove_if_owner, directory, os.getpid())
    if _STARTED_VARIABLE not in os.environ:
        os.environ[_STARTED_VARIABLE] = "1"
        _remove_files_of_the_dead()
    if not any(isinstance(known, _DirectoryCollector) for known in REGISTRY._collector_to_names):
        REGISTRY.register(_DirectoryCollector())


def directory() -> str:
    """Where all processes of this server share files. The first process that writes makes it."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ[DIRECTORY_VARIABLE]


def read() -> list[Metric]:
    """Merges our metrics of all processes of this server."""
    return list(MultiProcessCollector.merge([str(file) for file in _files()]))


class _DirectoryCollector(Collector):
    """Shows the metrics that the workers of this server wrote."""

    def collect(self) -> Iterable[Metric]:
        return read()

    def describe(self) -> Iterable[Metric]:
        return []


def _remove_if_owner(directory: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker also runs its parent's exit handlers
        shutil.rmtree(directory, ignore_errors=True)


def _files() -> Iterator[Path]:
    return Path(directory()).glob(f"*{_FILE_SUFFIX}-*.db")


def _remove_files_of_the_dead() -> None:
    """Removes files of dead processes: their gauges would tell of servers that have ended."""
    for file in _files():
        pid = int(file.stem.rsplit("-", 1)[1])
        # Containers reuse process ids, so a file with this process's id is from an earlier process.
        if pid == os.getpid() or not _is_running(pid):
            file.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _file(kind: str) -> MmapedDict:
    return _open(directory(), kind, os.getpid())


@functools.cache
def _open(path: str, kind: str, pid: int) -> MmapedDict:
    Path(path).mkdir(mode=0o700, exist_ok=True)
    name = Path(path) / f"{kind}{_FILE_SUFFIX}-{pid}.db"
    partial = name.with_suffix(".partial")  # a reader must not find it empty
    with partial.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _INITIAL_BYTES)
    partial.replace(name)
    return MmapedDict(str(name))


def _add(file: MmapedDict, key: str, amount: float) -> None:
    known = file.read_value(key)[0] if key in file._positions else 0.0
    _write(file, key, known + amount, 0.0)


def _write(file: MmapedDict, key: str, value: float, timestamp: float) -> None:
    """Writes a number, after making sure that there is room for it.

    prometheus-client makes and grows files without allocating their blocks. If the disk is full,
    a write to the memory map of such a file ends the process (SIGBUS).
    """
    needed = file._used + len(key.encode()) + _ENTRY_BYTES
    if key not in file._positions and needed > file._capacity:
        os.posix_fallocate(file._f.fileno(), 0, 2 * file._capacity)
    file.write_value(key, value, timestamp)
