"""The kill switch: a file that tells every worker of a server whether layers may run sparse.

The file holds ``on`` or ``off``. Workers run sparse while it holds ``on``. They run dense when it
holds anything else, cannot be read, or is gone: a cleaner of temporary files never turns sparse
attention on. The first process of a server writes ``on`` at start.

A worker looks at the file in each step that has a prefill, which takes microseconds, and a thread
of its looks twice a second. A change therefore takes effect from the next step on, and an idle
worker sees it as well. Each worker writes what it saw last into a file of its own, its
acknowledgement. The routes answer from these.
"""

import logging
import os
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vllm_afbs.files import write_atomically
from vllm_afbs.observability import instance, metric_files, metrics

logger = logging.getLogger("vllm.afbs")

WATCH_SECONDS = 0.5
REFRESH_SECONDS = 3600.0
"""How often the file is made to look new: cleaners remove what nobody has changed for days."""
_ON, _OFF = "on", "off"
_SWITCH, _SEEN = "switch", "seen"

_written: set[Path] = set()
"""Files that this process has begun. It begins none twice, so a file that is gone stays gone."""


@dataclass(frozen=True)
class State:
    """What the switch says.

    Attributes:
        enabled: Whether layers may run sparse.
        disabled_since: When they were forbidden to; None if they may, or if the file is gone.
    """

    enabled: bool
    disabled_since: datetime | None = None


def switch_file() -> Path:
    """The path of this server's file."""
    return instance.current().file(_SWITCH)


def begin() -> None:
    """Switches a new server on; the first process of a server and its workers call this.

    Workers on other machines do not see the first process's file, unless the machines share the
    directory. The first worker of each of these machines begins a file there.
    """
    server = instance.current()
    file = server.file(_SWITCH)
    may_begin = instance.is_first_process() or not server.is_of_this_host
    if not may_begin or file in _written:
        return
    _written.add(file)
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if instance.is_first_process():
            _remove_files_of_ended_servers(file.parent)
        if not file.exists():
            write_atomically(file, _ON)
    except OSError as error:
        logger.warning(
            "Every prefill runs dense: the kill switch cannot be kept in %s (%s). Name a directory "
            "that can be written in %s.",
            file.parent, error.strerror, instance.DIRECTORY_VARIABLE,
        )  # fmt: skip


def set_enabled(enabled: bool) -> None:
    """Allows sparse attention in all workers of this server, or forbids it.

    Raises:
        OSError: The directory cannot be written. The switch is unchanged.
    """
    file = switch_file()
    file.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(file, _ON if enabled else _OFF)


def read_state() -> State:
    """What the switch says now."""
    file = switch_file()
    if _says_on(file):
        return State(enabled=True)
    try:
        return State(False, datetime.fromtimestamp(file.stat().st_mtime, UTC))
    except OSError:
        return State(enabled=False)


def count_acknowledged(enabled: bool) -> int:
    """Number of running workers that last saw the switch in this state."""
    server = instance.current()
    prefix = f"{server.file(_SEEN).name}-"
    try:
        files = [file for file in Path(server.directory).iterdir() if file.name.startswith(prefix)]
    except OSError:
        return 0
    return sum(
        _is_live(*file.name.removeprefix(prefix).split("-")) and _says_on(file) == enabled
        for file in files
    )


def _is_live(host: str, pid: str) -> bool:
    """Whether a worker runs, as far as it can be known here."""
    return host != instance.host() or instance.is_running(int(pid))


class KillSwitch:
    """A worker's view of the switch."""

    def __init__(self) -> None:
        """Looks at it once, so that the metric exists before the first prefill."""
        begin()
        server = instance.current()
        self._file = str(server.file(_SWITCH))
        self._seen_file = Path(f"{server.file(_SEEN)}-{instance.host()}-{os.getpid()}")
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._enabled: bool | None = None
        self._refreshed_at = time.monotonic()
        self.is_enabled()
        # It holds no reference between its looks, so it ends with the switch.
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    def is_enabled(self) -> bool:
        """Whether layers may run sparse now. Logs, counts and acknowledges a change."""
        try:
            found = os.stat(self._file)  # noqa: PTH116 - a Path takes three times as long
        except OSError:
            stamp: tuple[int, ...] = ()
        else:
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            with self._lock:
                self._take(_says_on(Path(self._file)), bool(stamp))
                self._stamp = stamp
        return bool(self._enabled)

    def keep(self) -> None:
        """Looks at the switch, and keeps this worker's files and the switch from cleaners."""
        now = time.monotonic()
        if self.is_enabled() and now > self._refreshed_at + REFRESH_SECONDS:
            self._refreshed_at = now
            try:
                os.utime(self._file)
            except OSError as error:
                metric_files.warn_once(f"{self._file} cannot be kept new: {error.strerror}.")
        with self._lock:
            self._acknowledge(only_if_gone=True)
        metric_files.restore_files()

    def _take(self, enabled: bool, is_there: bool) -> None:
        if enabled == self._enabled:
            return
        known, self._enabled = self._enabled, enabled
        metrics.ENABLED.set(float(enabled))
        self._acknowledge()
        if known is not None or not enabled:
            why = "" if is_there else f": {self._file} is gone or cannot be read"
            logger.warning("Sparse attention is switched %s%s.", _ON if enabled else _OFF, why)

    def _acknowledge(self, only_if_gone: bool = False) -> None:
        try:
            if only_if_gone and self._seen_file.exists():
                return
            self._seen_file.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(self._seen_file, _ON if self._enabled else _OFF)
        except OSError as error:
            metric_files.warn_once(
                f"The kill switch is not acknowledged in {self._seen_file}: {error.strerror}."
            )


def _watch(reference: "weakref.ref[KillSwitch]") -> None:
    while True:
        time.sleep(WATCH_SECONDS)
        switch = reference()
        if switch is None:
            return
        switch.keep()
        del switch


def _says_on(file: Path) -> bool:
    try:
        return file.read_text(encoding="utf-8").strip() == _ON
    except (OSError, UnicodeDecodeError):
        return False


def _remove_files_of_ended_servers(directory: Path) -> None:
    for kind in (_SWITCH, _SEEN):
        prefix = f"afbs-{kind}-"
        for file in directory.glob(f"{prefix}*"):
            server_id = "-".join(file.name.removeprefix(prefix).split("-")[:3])
            if instance.has_ended(server_id):
                metric_files.remove(file)
