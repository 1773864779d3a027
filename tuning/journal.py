"""The journal: every finished step of a tuning job, so that a killed job can go on.

One JSON object a line, written by the job's own process and synced when the step is done. A step is
a pure function of the settings and of the steps before it, so a job that goes on from its journal
ends like one that was never stopped. A line cut short by the kill is dropped, and its step done
again.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_afbs.profile.schema import SCHEMA_VERSION
from vllm_afbs.tuning.model import InputError

Record = dict[str, Any]

FILE_NAME = "journal.jsonl"
SEARCH_VERSION = 3
"""Raised whenever the same settings lead the search elsewhere: a job ends as it was begun."""


class Steps:
    """The finished steps of a job, or of a part of one.

    Args:
        known: Those that were done before.
        keep: Called with each that is done now.
    """

    def __init__(self, known: Iterable[Record], keep: Callable[[Record], None]) -> None:
        self._steps = {record["step"]: record for record in known}
        self._keep = keep

    def __contains__(self, name: str) -> bool:
        return name in self._steps

    def step(self, name: str, compute: Callable[[], Record]) -> Record:
        """Returns the step's record, computing and keeping it if it was not done before.

        Args:
            name: The step, unique in the job.
            compute: Does the step; returns JSON values.

        Returns:
            What ``compute`` returned, with ``step`` and ``seconds`` (of wall time) added.
        """
        if name not in self._steps:
            start = time.perf_counter()
            result = compute()
            self.add({"step": name, **result, "seconds": time.perf_counter() - start})
        return self._steps[name]

    def add(self, record: Record) -> None:
        """Keeps a step that is done."""
        self._keep(record)
        self._steps[record["step"]] = record

    def steps(self, prefix: str) -> list[Record]:
        """The steps whose names begin so."""
        return [record for name, record in self._steps.items() if name.startswith(prefix)]

    def total(self, field: str) -> float:
        """Sum of a field over all steps that have it, whatever their order, rounded once."""
        return math.fsum(float(record.get(field, 0)) for record in self._steps.values())


class Journal(Steps):
    """An open journal.

    Args:
        path: The file; made if there is none.
        settings: What the steps depend on besides the selector and the search, as JSON values. A
            journal of other settings, or of another selector (``SCHEMA_VERSION``) or search
            (``SEARCH_VERSION``), is refused.

    Raises:
        InputError: The journal is damaged or of other settings.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path, settings: Record) -> None:
        self._path = path
        versions = {"schema_version": SCHEMA_VERSION, "search_version": SEARCH_VERSION}
        settings = {**versions, **settings}
        lines = self._read()
        header = next(lines, None)
        if header is None:
            self._append(settings)
        elif difference := _difference(header, settings):
            raise InputError(
                f"{path}: journal of another job: {difference}; remove it to start anew"
            )
        super().__init__(lines, self._append)

    def _append(self, record: Record) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # A write does not say which file it was for.
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def _read(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(self._path, complete)
        for number, line in enumerate(content[:complete].splitlines(), start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or (number > 1 and "step" not in record):
                raise InputError(
                    f"{self._path}: line {number}: a JSON step expected; remove the file"
                )
            yield record


def read_steps(path: Path) -> list[Record]:
    """The steps of a finished job's journal, in the order they were done.

    Raises:
        OSError: It cannot be read.
    """
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _difference(recorded: Record, wanted: Record) -> str | None:
    for name in sorted(recorded.keys() | wanted.keys()):
        if recorded.get(name) != wanted.get(name):
            return f"{name} is {recorded.get(name)!r} in it and {wanted.get(name)!r} now"
    return None
