"""How a job says how far it is."""

from typing import Protocol


class Progress(Protocol):
    """Is told how far a job is."""

    def begin(self, stage: str, total: int) -> None:
        """A stage of ``total`` units begins."""

    def advance(self, units: float) -> None:
        """That many more units are done; fractions count."""
