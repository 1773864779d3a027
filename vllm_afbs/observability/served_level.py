"""The level of the profile that a server's workers serve: a dial that turns while they serve.

Workers begin with the level that was chosen at start. A file names another one for all of them;
``server_file`` says how they follow it. If the file is gone, cannot be read or names no level of
the profile, they serve the one chosen at start.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet, WeakValueDictionary

from vllm_afbs.files import printable
from vllm_afbs.observability import instance, metrics
from vllm_afbs.observability.server_file import Follower, ServerFile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.afbs")

_FILE = ServerFile(kind="level", acknowledged_as="served", what="The level")
_MAX_SHOWN = 40
"""Most characters of a file's word in the log."""


@dataclass(frozen=True)
class Levels:
    """The levels that a server may serve.

    Attributes:
        names: Of the profile's levels, in its order.
        start: The one chosen at start.
    """

    names: tuple[str, ...]
    start: str

    @classmethod
    def of(cls, vllm_config: "VllmConfig", profile: Profile) -> "Levels":
        """The levels of a profile.

        Raises:
            ProfileError: The configured level is none of the profile's.
        """
        names = tuple(level.name for level in profile.levels)
        return cls(names, names[admission.start_level(vllm_config, profile)])

    def begin(self) -> None:
        """Writes a new server's file; see ``ServerFile.begin``."""
        try:
            _FILE.begin(self.start)
        except OSError as error:
            logger.warning(
                "The level cannot be changed while serving: its file cannot be kept in %s (%s). "
                "Name a directory that can be written in %s.",
                _FILE.path.parent, error.strerror, instance.DIRECTORY_VARIABLE,
            )  # fmt: skip

    def read(self) -> str:
        """The level that workers are told to serve."""
        return self.named(_FILE.read())

    def named(self, word: str | None) -> str:
        """The level that is served where the file holds a word, or none."""
        return word if word in self.names else self.start


def level_file() -> Path:
    """The path of this server's file."""
    return _FILE.path


def set_level(name: str) -> None:
    """Makes all workers of this server serve a level, which the profile has to have.

    Raises:
        OSError: The directory cannot be written. The level is unchanged.
    """
    _FILE.write(name)


def count_acknowledged(name: str) -> int:
    """Number of running workers that serve a level from their next step on."""
    return _FILE.count_acknowledged(name)


class LevelDial(Follower):
    """A worker's view of the level; get it from ``dial``.

    Args:
        levels: The levels that it may be turned to.
    """

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self._step: object = None
        self._askers: WeakSet[object] = WeakSet()
        self._index = 0
        levels.begin()
        super().__init__(_FILE)

    def index(self, step: object, asker: object) -> int:
        """Place of the level that a step serves, in the profile's levels.

        The file is looked at once for each step, so that a step of several metadata builders has
        the same level in all its layers.

        Args:
            step: An object that all of a step's metadata share.
            asker: Who asks, once for each step.
        """
        if step is not self._step or asker in self._askers:
            self._index = self._levels.names.index(self.look())
            self._step, self._askers = step, WeakSet()
        self._askers.add(asker)
        return self._index

    def follow(self, word: str | None) -> str:
        """See ``Follower``."""
        followed = self._levels.named(word)
        if word is not None and followed != word:
            shown = printable(word[:_MAX_SHOWN])
            logger.warning(
                "%s names no level of the profile (one of %s expected, got %s): level %s is "
                "served, which was chosen at start.",
                self._file, ", ".join(self._levels.names), repr(shown), followed,
            )  # fmt: skip
        return followed

    def keeps_new(self, followed: str) -> bool:
        """See ``Follower``; where there is no file there is nothing to keep."""
        return bool(self._stamp)

    def changed(self, before: str | None, now: str, is_there: bool) -> None:
        """See ``Follower``."""
        for name in self._levels.names:
            metrics.LEVEL.set(float(name == now), name)
        if before is not None:
            why = "" if is_there else f", chosen at start: {self._file} is gone or cannot be read"
            logger.warning("Level %s is served, no longer %s%s.", now, before, why)


_DIALS: "WeakValueDictionary[tuple[Path, Levels], LevelDial]" = WeakValueDictionary()


def dial(levels: Levels) -> LevelDial:
    """The dial of this worker, which its metadata builders share."""
    key = level_file(), levels
    found = _DIALS.get(key)
    if found is None:
        found = _DIALS[key] = LevelDial(levels)
    return found
