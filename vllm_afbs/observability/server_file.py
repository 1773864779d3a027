"""A file that holds one word for all workers of a server, such as the kill switch.

The routes write it, or an operator by hand. A worker looks at the file in each step that has a
prefill, which takes microseconds, and a thread of its looks twice a second. A change therefore
takes effect from the next step on, and an idle worker sees it as well. Each worker writes what it
follows into a file of its own, its acknowledgement. The routes answer from these.
"""

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from vllm_afbs.files import write_atomically
from vllm_afbs.observability import instance, metric_files

WATCH_SECONDS = 0.5
REFRESH_SECONDS = 3600.0
"""How often the file is made to look new: cleaners remove what nobody has changed for days."""

_begun: set[Path] = set()
"""Files that this process has begun. It begins none twice, so a file that is gone stays gone."""


@dataclass(frozen=True)
class ServerFile:
    """One kind of such files; each server has one of its own.

    Attributes:
        kind: In the file's name.
        acknowledged_as: In the names of the workers' files.
        what: What it is, for messages.
    """

    kind: str
    acknowledged_as: str
    what: str

    @property
    def path(self) -> Path:
        """The path of this server's file."""
        return instance.current().file(self.kind)

    @property
    def acknowledged_path(self) -> Path:
        """The path of this worker's acknowledgement."""
        prefix = instance.current().file(self.acknowledged_as)
        return Path(f"{prefix}-{instance.host()}-{os.getpid()}")

    def begin(self, word: str) -> None:
        """Writes a new server's file; the first process of a server and its workers call this.

        Workers on other machines do not see the first process's file, unless the machines share
        the directory. The first worker of each of these machines begins a file there.

        Raises:
            OSError: The directory cannot be written.
        """
        file = self.path
        may_begin = instance.is_first_process() or not instance.current().is_of_this_host
        if not may_begin or file in _begun:
            return
        _begun.add(file)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        if instance.is_first_process():
            self._remove_files_of_ended_servers(file.parent)
        if not file.exists():
            write_atomically(file, word)

    def write(self, word: str) -> None:
        """Tells the workers another word.

        Raises:
            OSError: The directory cannot be written. The file is unchanged.
        """
        file = self.path
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_atomically(file, word)

    def read(self) -> str | None:
        """The word; None if the file is gone or cannot be read."""
        return _read(self.path)

    def count_acknowledged(self, word: str) -> int:
        """Number of running workers that follow this word."""
        server = instance.current()
        prefix = f"{server.file(self.acknowledged_as).name}-"
        try:
            found = list(Path(server.directory).iterdir())
        except OSError:
            return 0
        return sum(
            _is_live(*file.name.removeprefix(prefix).split("-")) and _read(file) == word
            for file in found
            if file.name.startswith(prefix)
        )

    def _remove_files_of_ended_servers(self, directory: Path) -> None:
        for kind in (self.kind, self.acknowledged_as):
            prefix = f"afbs-{kind}-"
            for file in directory.glob(f"{prefix}*"):
                server_id = "-".join(file.name.removeprefix(prefix).split("-")[:3])
                if instance.has_ended(server_id):
                    metric_files.remove(file)


class Follower(ABC):
    """A worker's view of a server's file."""

    def __init__(self, file: ServerFile) -> None:
        """Looks at the file once, and begins to watch it."""
        self._what = file.what
        self._file, self._acknowledged = str(file.path), file.acknowledged_path
        self._lock = threading.Lock()
        self._stamp: tuple[int, ...] | None = None
        self._followed: str | None = None
        self._refreshed_at = time.monotonic()
        self.look()
        # It holds no reference between its looks, so it ends with the follower.
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    @abstractmethod
    def follow(self, word: str | None) -> str:
        """What the worker follows where the file holds a word.

        Args:
            word: None: the file is gone or cannot be read.
        """

    @abstractmethod
    def changed(self, before: str | None, now: str, is_there: bool) -> None:
        """Logs and counts what the worker follows from now on.

        Args:
            before: What it followed; None: it has looked for the first time.
            now: What it follows.
            is_there: Whether the file is there.
        """

    @abstractmethod
    def keeps_new(self, followed: str) -> bool:
        """Whether to keep the file from cleaners, by its age, while the worker follows this."""

    def look(self) -> str:
        """What the worker follows now. Logs, counts and acknowledges a change."""
        try:
            found = os.stat(self._file)  # noqa: PTH116 - a Path takes three times as long
        except OSError:
            stamp: tuple[int, ...] = ()
        else:
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            with self._lock:
                self._take(self.follow(_read(Path(self._file))), bool(stamp))
                self._stamp = stamp
        assert self._followed is not None
        return self._followed

    def keep(self) -> None:
        """Looks at the file, and keeps it and this worker's files from cleaners."""
        followed, now = self.look(), time.monotonic()
        if self.keeps_new(followed) and now > self._refreshed_at + REFRESH_SECONDS:
            self._refreshed_at = now
            try:
                os.utime(self._file)
            except OSError as error:
                metric_files.warn_once(f"{self._file} cannot be kept new: {error.strerror}.")
        with self._lock:
            self._acknowledge(only_if_gone=True)

    def _take(self, followed: str, is_there: bool) -> None:
        if followed == self._followed:
            return
        before, self._followed = self._followed, followed
        self.changed(before, followed, is_there)
        self._acknowledge()  # last, so that metrics show by then what is acknowledged

    def _acknowledge(self, only_if_gone: bool = False) -> None:
        assert self._followed is not None
        try:
            if only_if_gone and self._acknowledged.exists():
                return
            self._acknowledged.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(self._acknowledged, self._followed)
        except OSError as error:
            metric_files.warn_once(
                f"{self._what} is not acknowledged in {self._acknowledged}: {error.strerror}."
            )


def _watch(reference: "weakref.ref[Follower]") -> None:
    while True:
        time.sleep(WATCH_SECONDS)
        follower = reference()
        if follower is None:
            return
        follower.keep()
        del follower


def _is_live(host: str, pid: str) -> bool:
    """Whether a worker runs, as far as it can be known here."""
    return host != instance.host() or instance.is_running(int(pid))


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
