"""The journal: every finished step of a tuning job, so that a killed job can go on.

The job's own process writes one JSON object per line and syncs it when the step is done. A step is
a pure function of the settings and of the steps before it, so a job that resumes from its journal
ends like one that was never stopped. If a kill cuts a line short, the line is dropped and its step
is done again.

Results travel through the tuner as frozen dataclasses. They become JSON here and nowhere else, and
what is read back is checked against the dataclass that the step promises.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from vllm_afbs.errors import InputError
from vllm_afbs.profile.schema import SCHEMA_VERSION

FILE_NAME = "journal.jsonl"
FORMAT_VERSION = 3
"""Raised whenever a line of the journal, or a step's result, changes its shape."""
SEARCH_VERSION = 5
"""Raised whenever the same settings lead the search elsewhere: a job ends as it was begun."""

T = TypeVar("T")


@dataclass(frozen=True)
class _TensorOf:
    """Says how a one-dimensional tensor is kept: as a list of finite numbers, read as a dtype."""

    dtype: torch.dtype

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        numbers = core_schema.list_schema(core_schema.float_schema(allow_inf_nan=False))
        return core_schema.no_info_after_validator_function(
            lambda values: torch.tensor(values, dtype=self.dtype),
            numbers,
            serialization=core_schema.plain_serializer_function_ser_schema(torch.Tensor.tolist),
        )


Float32 = Annotated[torch.Tensor, _TensorOf(torch.float32)]
"""A tensor of one dimension that a result keeps, fp32."""
Float64 = Annotated[torch.Tensor, _TensorOf(torch.float64)]
"""A tensor of one dimension that a result keeps, fp64."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a step finds: a frozen dataclass of plain values, ``Float32``, ``Float64`` and models.

    Every tensor of a result has one value per head.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    def __post_init__(self) -> None:
        """Checks that all tensors have as many heads."""
        lengths = {
            name: {len(tensor) for tensor in _tensors(each)} for name, each in vars(self).items()
        }
        if len(set().union(*lengths.values())) > 1:
            raise ValueError(f"one value per head expected, got {lengths}")


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of an attribute: itself, or those of a tuple."""
    return [
        each for each in (value if isinstance(value, tuple) else [value]) if torch.is_tensor(each)
    ]


class Meter(Protocol):
    """Counts what a step computes."""

    evaluations: int
    cost: float

    def reset(self) -> None:
        """Starts counting anew."""


@dataclass(frozen=True)
class Entry:
    """A finished step: one line of the journal.

    Attributes:
        step: The step's name, unique in the job.
        kind: Name of the result's type.
        result: The result as JSON values.
        seconds: Wall time that the step took.
        evaluations: Heads scored; see ``search.scorer``.
        cost: Cost of these evaluations.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    step: str
    kind: str
    result: Any
    seconds: float
    evaluations: int = 0
    cost: float = 0.0

    @classmethod
    def of(cls, step: str, kind: type[Any], result: Any, **spent: Any) -> "Entry":
        """Encodes a step's result; the rest is given by name.

        Raises:
            ValueError: A number of it is not finite.
        """
        encoded = json.dumps(_adapter(kind).dump_python(result), allow_nan=False)
        return cls(step, kind.__name__, json.loads(encoded), **spent)

    def read(self, kind: type[T]) -> T:
        """Decodes the result.

        Raises:
            InputError: It is not of that kind.
        """
        if self.kind != kind.__name__:
            raise InputError(f"step {self.step!r}: {kind.__name__} expected, got {self.kind!r}")
        try:
            return _adapter(kind).validate_json(json.dumps(self.result))
        except ValidationError as error:
            raise InputError(f"step {self.step!r}: {_first(error)}") from None


class Steps:
    """The finished steps of a job, or of a part of one.

    Args:
        known: Those that were done before.
        keep: Called with each that is done now.
        source: Where the known ones come from, for the message to the user.
    """

    def __init__(
        self, known: Iterable[Entry], keep: Callable[[Entry], None], source: str = "journal"
    ) -> None:
        self._entries = {entry.step: entry for entry in known}
        self._keep = keep
        self._source = source

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def step(
        self, name: str, kind: type[T], compute: Callable[[], T], meter: Meter | None = None
    ) -> T:
        """Returns the step's result, computing and keeping it if it was not done before.

        Args:
            name: The step, unique in the job.
            kind: Type of the result: a ``Result``, a pydantic model or a type of JSON values.
            compute: Does the step.
            meter: Counts what the step computes; None if it scores no heads.

        Raises:
            InputError: The step was done before, and its result is not of that kind.
        """
        if name not in self._entries:
            self.add(_done(name, kind, compute, meter))
        return self.result(name, kind)

    def result(self, name: str, kind: type[T]) -> T:
        """The result of a finished step.

        Raises:
            InputError: It is not of that kind.
        """
        try:
            return self.entry(name).read(kind)
        except InputError as error:
            raise InputError(f"{self._source}: {error}; remove the file to start anew") from None

    def entry(self, name: str) -> Entry:
        """A finished step."""
        return self._entries[name]

    def add(self, entry: Entry) -> None:
        """Keeps a step that is done."""
        self._keep(entry)
        self._entries[entry.step] = entry

    def entries(self, prefix: str) -> list[Entry]:
        """The steps whose names begin with ``prefix``."""
        return [entry for name, entry in self._entries.items() if name.startswith(prefix)]

    def total(self, field: Literal["evaluations", "cost", "seconds"]) -> float:
        """Sum of a field over all steps, rounded once, so that their order does not matter."""
        return math.fsum(float(getattr(entry, field)) for entry in self._entries.values())


class Journal(Steps):
    """An open journal.

    Args:
        path: The file; made if there is none.
        settings: What the steps depend on besides the selector and the search, as JSON values. A
            journal of other settings, or of another selector (``SCHEMA_VERSION``), search
            (``SEARCH_VERSION``) or format (``FORMAT_VERSION``), is refused.

    Raises:
        InputError: The journal is damaged, of another version or of other settings.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        header = {
            "format_version": FORMAT_VERSION,
            "schema_version": SCHEMA_VERSION,
            "search_version": SEARCH_VERSION,
            **settings,
        }
        lines = _complete_lines(path)
        if lines:
            _check_header(path, lines[0], header)
        else:
            self._append(json.dumps(header, allow_nan=False))
        super().__init__(_entries(path, lines), self._write, str(path))

    def _write(self, entry: Entry) -> None:
        self._append(json.dumps(vars(entry), allow_nan=False))

    def _append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # The error of a write does not name the file.
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def read_entries(path: Path) -> list[Entry]:
    """The steps of a finished job's journal, in the order they were done.

    Raises:
        InputError: A line is not a step.
        OSError: It cannot be read.
    """
    return list(_entries(path, path.read_bytes().splitlines()))


def _done(name: str, kind: type[T], compute: Callable[[], T], meter: Meter | None) -> Entry:
    if meter is not None:
        meter.reset()
    start = time.perf_counter()
    result = compute()
    seconds = time.perf_counter() - start
    if meter is None:
        return Entry.of(name, kind, result, seconds=seconds)
    spent = {"evaluations": meter.evaluations, "cost": float(meter.cost)}
    return Entry.of(name, kind, result, seconds=seconds, **spent)


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    hashable: Any = kind  # mypy takes no type[T] for hashable
    return _cached_adapter(hashable)


@cache
def _cached_adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first(error: ValidationError) -> str:
    """The first fault on one line: where it is and what was expected."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(each) for each in fault["loc"])
    message = " ".join(fault["msg"].split())
    return f"{where}: {message}" if where else message


def _complete_lines(path: Path) -> list[bytes]:
    """A journal's lines, none if there is no file; a line cut short by a kill is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
    return content[:complete].splitlines()


def _check_header(path: Path, line: bytes, wanted: dict[str, Any]) -> None:
    try:
        recorded = json.loads(line)
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise InputError(
            f"{path}: line 1: the job's settings expected as a JSON object; remove the file to "
            "start anew"
        )
    version = recorded.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: journal of another version of vllm-afbs: format {FORMAT_VERSION} expected, "
            f"got {version!r}; go on with that version, or remove the file to start anew"
        )
    for name in sorted(recorded.keys() | wanted.keys()):
        if recorded.get(name) != wanted.get(name):
            raise InputError(
                f"{path}: journal of another job: {name} is {recorded.get(name)!r} in it and "
                f"{wanted.get(name)!r} now; remove it to start anew"
            )


def _entries(path: Path, lines: list[bytes]) -> Iterator[Entry]:
    """The steps of all lines but the first, which holds the settings."""
    for number, line in enumerate(lines[1:], start=2):
        try:
            yield _adapter(Entry).validate_json(line)
        except ValidationError as error:
            raise InputError(
                f"{path}: line {number}: a step expected: {_first(error)}; remove the file to "
                "start anew"
            ) from None
