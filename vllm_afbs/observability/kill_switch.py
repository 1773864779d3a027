"""The kill switch: a file that tells every worker of a server whether layers may run sparse.

The file holds ``on`` or ``off``. Workers run sparse while it holds ``on``. They run dense when it
holds anything else, cannot be read, or is gone: a cleaner of temporary files never turns sparse
attention on. The first process of a server writes ``on`` at start. ``server_file`` says how workers
follow the file.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vllm_afbs.observability import instance, metric_files, metrics
from vllm_afbs.observability.server_file import Follower, ServerFile

logger = logging.getLogger("vllm.afbs")

_ON, _OFF = "on", "off"
_FILE = ServerFile(kind="switch", acknowledged_as="seen", what="The kill switch")


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
    return _FILE.path


def begin() -> None:
    """Switches a new server on; see ``ServerFile.begin``."""
    try:
        _FILE.begin(_ON)
    except OSError as error:
        logger.warning(
            "Every prefill runs dense: the kill switch cannot be kept in %s (%s). Name a directory "
            "that can be written in %s.",
            _FILE.path.parent, error.strerror, instance.DIRECTORY_VARIABLE,
        )  # fmt: skip


def set_enabled(enabled: bool) -> None:
    """Allows sparse attention in all workers of this server, or forbids it.

    Raises:
        OSError: The directory cannot be written. The switch is unchanged.
    """
    _FILE.write(_ON if enabled else _OFF)


def read_state() -> State:
    """What the switch says now."""
    if _FILE.read() == _ON:
        return State(enabled=True)
    try:
        return State(False, datetime.fromtimestamp(_FILE.path.stat().st_mtime, UTC))
    except OSError:
        return State(enabled=False)


def count_acknowledged(enabled: bool) -> int:
    """Number of running workers that last saw the switch in this state."""
    return _FILE.count_acknowledged(_ON if enabled else _OFF)


class KillSwitch(Follower):
    """A worker's view of the switch."""

    def __init__(self) -> None:
        """Looks at it once, so that the metric exists before the first prefill."""
        begin()
        super().__init__(_FILE)

    def is_enabled(self) -> bool:
        """Whether layers may run sparse now. Logs, counts and acknowledges a change."""
        return self.look() == _ON

    def follow(self, word: str | None) -> str:
        """See ``Follower``."""
        return _ON if word == _ON else _OFF

    def keeps_new(self, followed: str) -> bool:
        """See ``Follower``; the age of a switch that is off tells since when."""
        return followed == _ON

    def keep(self) -> None:
        """See ``Follower``. Every worker has one switch, so it keeps the metrics' files as well."""
        super().keep()
        metric_files.restore_files()

    def changed(self, before: str | None, now: str, is_there: bool) -> None:
        """See ``Follower``."""
        metrics.ENABLED.set(float(now == _ON))
        if before is not None or now == _OFF:
            why = "" if is_there else f": {self._file} is gone or cannot be read"
            logger.warning("Sparse attention is switched %s%s.", now, why)
