"""The kill switch: one file that tells every worker of a server to run dense.

It lies in the directory of the metrics, which all processes of a server share, and its being there
means off. A worker looks once per step that has a prefill, which takes it microseconds, so a change
holds from the next step on, and one that is restarted finds the switch as it was left. Nothing has
to be sent: ``touch`` and ``rm`` do what the routes do.
"""

import logging
from datetime import UTC, datetime
from pathlib import Path

from vllm_afbs.observability import metrics

logger = logging.getLogger("vllm.afbs")

FILE_NAME = "afbs-disabled"


def switch_file() -> Path:
    """The file of this server."""
    return Path(metrics.directory()) / FILE_NAME


def set_enabled(enabled: bool) -> None:
    """Lets all workers of this server run sparse, or none.

    Raises:
        OSError: The directory cannot be written; nothing changed.
    """
    file = switch_file()
    if enabled:
        file.unlink(missing_ok=True)
    else:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.touch()
    metrics.ENABLED.set(float(enabled))


def disabled_since() -> datetime | None:
    """When sparse attention was switched off; None if it is not."""
    try:
        return datetime.fromtimestamp(switch_file().stat().st_mtime, UTC)
    except FileNotFoundError:
        return None


class KillSwitch:
    """A worker's view of the switch."""

    def __init__(self) -> None:
        """Looks at it once, so that the metric is there before the first prefill."""
        self._file = switch_file()
        self._known = True
        metrics.ENABLED.set(float(self.is_enabled()))

    def is_enabled(self) -> bool:
        """Whether layers may run sparse now; a change is logged and shown on ``/metrics``."""
        enabled = not self._file.exists()
        if enabled != self._known:
            self._known = enabled
            metrics.ENABLED.set(float(enabled))
            logger.warning("Sparse attention is switched %s.", "on" if enabled else "off")
        return enabled
