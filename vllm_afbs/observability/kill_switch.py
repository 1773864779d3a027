"""The kill switch: a file whose existence tells every worker of a server to run dense.

The file lies in the directory of the metrics, which all processes of a server share. A worker looks
for it once in each step that has a prefill, which takes microseconds. A change therefore takes
effect from the next step on, and a restarted worker finds the switch as it was left. Creating the
file with ``touch`` and deleting it with ``rm`` do the same as the routes.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path

from vllm_afbs.observability import metrics

logger = logging.getLogger("vllm.afbs")

FILE_NAME = "afbs-disabled"


def switch_file() -> Path:
    """The path of this server's file."""
    return Path(metrics.directory()) / FILE_NAME


def set_enabled(enabled: bool) -> None:
    """Allows sparse attention in all workers of this server, or forbids it.

    Raises:
        OSError: The directory cannot be written. The switch is unchanged.
    """
    file = switch_file()
    if enabled:
        file.unlink(missing_ok=True)
    else:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.touch()
    metrics.ENABLED.set(float(enabled))


def disabled_since() -> datetime | None:
    """When sparse attention was switched off; None if it is on."""
    try:
        return datetime.fromtimestamp(switch_file().stat().st_mtime, UTC)
    except FileNotFoundError:
        return None


class KillSwitch:
    """A worker's view of the switch."""

    def __init__(self) -> None:
        """Looks at it once, so that the metric exists before the first prefill."""
        self._file = switch_file()
        self._known = True
        metrics.ENABLED.set(float(self.is_enabled()))

    def is_enabled(self) -> bool:
        """Whether layers may run sparse now. Logs changes and shows them on ``/metrics``."""
        enabled = not self._file.exists()
        if enabled != self._known:
            self._known = enabled
            metrics.ENABLED.set(float(enabled))
            logger.warning("Sparse attention is switched %s.", "on" if enabled else "off")
        return enabled
