"""Who hears how far a job is."""

from typing import Protocol


class Progress(Protocol):
    """Hears how far a job is."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of ``total`` units begins."""

    def advance(self, units: float) -> None:
        """So many more units are done, fractions included."""
