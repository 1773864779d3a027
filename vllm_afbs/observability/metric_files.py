"""The files of the metrics: each process writes its own, and the API server reads all of them.

They have prometheus-client's multi-process format, so that vLLM's own collector reads them where
there are several API servers. Nothing that happens to a file stops a server:

* A file that cannot be written costs its numbers. One warning says so.
* A file that somebody removed while the server runs is written again, with its numbers.
* A damaged file, or one that cannot be read, is left out. One warning says so.
"""

import functools
import json
import logging
import os
import re
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_afbs.observability import instance

logger = logging.getLogger("vllm.afbs")

LOCK = threading.Lock()
"""Held while numbers are written. On CUDA, a thread of its own reports what the device has
finished; two threads could open the same file twice and overwrite each other's numbers."""
RETRY_SECONDS = 10.0
"""How long nothing is written after a failure: a failed attempt takes longer than a report."""
_INITIAL_BYTES = 1 << 20  # size of a new file, the same as prometheus-client's
_ENTRY_BYTES = 32  # most bytes of an entry besides its key
_NAME = re.compile(
    r"(?:counter|histogram|gauge_[a-z]+)_afbs-(?:(?P<server>\w+-\d+-[0-9a-f]+)-)?(?P<pid>\d+)\.db"
)
"""Tells our files from those that prometheus-client itself may write for the same process. Up to
0.1 the names had no server."""
_HEADER_BYTES = 8  # how many bytes are used, and padding
_LENGTH, _NUMBERS = struct.Struct("i"), struct.Struct("dd")

Entry = tuple[str, float, float, int]
"""Key, value, timestamp, and the value's place in the file."""


class NumberFile:
    """One file of this process, by the kind of its metrics."""

    def __init__(self, path: Path) -> None:
        """Makes the file.

        Raises:
            OSError: It cannot be written.
        """
        self.path = path
        self._numbers = _create(path, b"")

    def add(self, key: str, amount: float) -> None:
        """Adds to a number, which begins at 0."""
        known = self._numbers.read_value(key)[0] if key in self._numbers._positions else 0.0
        self.write(key, known + amount, 0.0)

    def enter(self, keys: Sequence[str]) -> None:
        """Makes sure that all of these numbers are there."""
        if keys[-1] not in self._numbers._positions:
            for key in keys:
                self.add(key, 0.0)

    def write(self, key: str, value: float, timestamp: float) -> None:
        """Writes a number, after making sure that there is room for it.

        prometheus-client makes and grows files without allocating their blocks. If the disk is
        full, a write to the memory map of such a file ends the process (SIGBUS).
        """
        numbers = self._numbers
        needed = numbers._used + len(key.encode()) + _ENTRY_BYTES
        if key not in numbers._positions and needed > numbers._capacity:
            os.posix_fallocate(numbers._f.fileno(), 0, 2 * numbers._capacity)
        numbers.write_value(key, value, timestamp)

    def restore(self, thoroughly: bool = False) -> None:
        """Writes the file again if it was removed, or made anew if it was cut short.

        Args:
            thoroughly: Also look whether the file is still in its place, which takes longer.

        Raises:
            OSError: It cannot be written.
        """
        found = os.fstat(self._numbers._f.fileno())
        if found.st_size < self._numbers._capacity:
            # Its memory map must not be touched: that would end the process (SIGBUS).
            self._numbers = _create(self.path, b"")
        elif found.st_nlink == 0 or (thoroughly and not _is_at(self.path, found)):
            self._numbers = _create(self.path, self._numbers._m[: self._numbers._used])


@dataclass
class _Files:
    """The files of this process.

    Attributes:
        opened: By directory and server, kind and process id.
        retry_at: Until when nothing is written, on the monotonic clock.
    """

    opened: dict[tuple[instance.Instance, str, int], NumberFile]
    retry_at: float = 0.0


_files = _Files({})


def open_file(kind: str) -> NumberFile:
    """This process's file of one kind of metrics, whole. ``LOCK`` has to be held.

    Args:
        kind: As prometheus-client names it: ``counter``, ``histogram`` or ``gauge_MODE``.

    Raises:
        OSError: The file cannot be written.
    """
    server, pid = instance.current(), os.getpid()
    file = _files.opened.get((server, kind, pid))
    if file is None:
        path = Path(server.directory) / f"{kind}_afbs-{server.server_id}-{pid}.db"
        file = _files.opened[server, kind, pid] = NumberFile(path)
    else:
        file.restore()
    return file


def may_write() -> bool:
    """Whether it is worth trying to write."""
    return time.monotonic() >= _files.retry_at


def report_failure(error: OSError) -> None:
    """Logs once that numbers are lost, and keeps this process from trying at every step."""
    _files.retry_at = time.monotonic() + RETRY_SECONDS
    where = instance.current().directory
    warn_once(
        f"Metrics are not written to {where}: {error.strerror or error}. The server goes on "
        "without them."
    )


def restore_files() -> None:
    """Writes files of this process again that were removed. Never raises."""
    if not may_write():
        return
    server, pid = instance.current(), os.getpid()
    try:
        with LOCK:
            for (owner, _, owner_pid), file in _files.opened.items():
                if (owner, owner_pid) == (server, pid):
                    file.restore(thoroughly=True)
    except OSError as error:
        report_failure(error)


def read() -> list[Metric]:
    """Merges our metrics of all processes of this server; unreadable files are left out."""
    return list(MultiProcessCollector.merge([str(file) for file in _files_of_this_server()]))


def tolerate_damaged_files() -> None:
    """Makes prometheus-client leave out files that it cannot read.

    Otherwise a single one fails every request for ``/metrics``, with vLLM's own metrics.
    """
    MmapedDict.read_all_values_from_file = staticmethod(read_entries)  # type: ignore[method-assign]


def read_entries(path: str) -> list[Entry]:
    """The numbers of a file; none, and a warning, if it is damaged or cannot be read."""
    try:
        with Path(path).open("rb") as file:
            header = file.read(_HEADER_BYTES)
            if len(header) < _HEADER_BYTES:
                raise ValueError(f"at least {_HEADER_BYTES} bytes expected, found {len(header)}")
            (used,) = _LENGTH.unpack_from(header, 0)
            return list(_entries(header + file.read(max(0, used - _HEADER_BYTES)), used))
    except FileNotFoundError:  # removed since the directory was listed
        return []
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        warn_once(f"Metrics of {path} are not shown: {reason}.")
        return []


def remove_files_of_the_dead() -> None:
    """Removes files of ended processes: their gauges would tell of servers that have ended."""
    for file, server_id, pid in _our_files():
        is_of_this_host = server_id is None or server_id.split("-")[0] == instance.host()
        # Containers reuse process ids, so a file with this process's id is from an earlier process.
        has_ended = pid == os.getpid() or not instance.is_running(pid)
        if (is_of_this_host and has_ended) or instance.has_ended(server_id or ""):
            remove(file)


def remove(file: Path) -> None:
    """Removes a file of an ended server if it may be removed."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        warn_once(f"{file} of an ended server cannot be removed: {error.strerror}.")


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning at its first call."""
    logger.warning("%s", message)


def _files_of_this_server() -> list[Path]:
    own = instance.current().server_id
    return [file for file, server_id, _ in _our_files() if server_id == own]


def _our_files() -> Iterator[tuple[Path, str | None, int]]:
    """Our files in the directory, with their server and their process."""
    directory = instance.current().directory
    try:
        names = os.listdir(directory)  # noqa: PTH208 - iterdir hides no error, and makes paths of all
    except FileNotFoundError:  # nobody has written yet
        return
    except OSError as error:
        warn_once(f"Metrics in {directory} are not shown: {error.strerror}.")
        return
    for name in names:
        if match := _NAME.fullmatch(name):
            yield Path(directory, name), match["server"], int(match["pid"])


def _create(path: Path, content: bytes) -> MmapedDict:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # A reader must not find it empty, and nobody else's file or link may be in the way.
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=".afbs-", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, max(_INITIAL_BYTES, 2 * len(content)))
            file.write(content)
        Path(partial).replace(path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise
    return MmapedDict(str(path))


def _is_at(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), found)
    except OSError:
        return False


def _entries(data: bytes, used: int) -> Iterator[Entry]:
    """Reads the numbers among the used bytes of a file.

    Raises:
        ValueError: The file is damaged.
    """
    if not 0 <= used <= len(data):
        raise ValueError("damaged: its header does not fit its size")
    position = _HEADER_BYTES
    while position < used:
        if position + _LENGTH.size > used:
            raise ValueError(f"damaged at byte {position}")
        (length,) = _LENGTH.unpack_from(data, position)
        start = position + _LENGTH.size
        place = start + length + 8 - (length + 4) % 8
        if length <= 0 or place + _NUMBERS.size > used:
            raise ValueError(f"damaged at byte {position}")
        key = data[start : start + length].decode()
        if not _is_key(key):
            raise ValueError(f"damaged at byte {position}: no metric's name and labels")
        value, timestamp = _NUMBERS.unpack_from(data, place)
        yield key, value, timestamp, place
        position = place + _NUMBERS.size


@functools.lru_cache(maxsize=1 << 16)
def _is_key(key: str) -> bool:
    """Whether a key is what prometheus-client's collector expects."""
    try:
        metric, sample, labels, text = json.loads(key)
        float(labels.get("le", 0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False
    names = (metric, sample, text, *labels.values())
    return all(isinstance(name, str) for name in names)
