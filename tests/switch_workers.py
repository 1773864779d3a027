"""Workers of a server in processes of their own, without vLLM, which takes seconds to import."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from vllm_afbs.observability import kill_switch, metrics, served_level
from vllm_afbs.observability.served_level import Levels

# vLLM resolves its platform, and so calls this, when a spawned process begins to unpickle.
metrics.publish()


def work(pipe: Connection, levels: Levels | None) -> None:
    """Tells, whenever it is asked, whether a step may run sparse, or at which level."""
    switch = kill_switch.KillSwitch()
    dial = None if levels is None else served_level.dial(levels)
    pipe.send(switch.is_enabled())
    while asked := pipe.recv():
        if asked == "level":
            assert dial is not None
            pipe.send(dial.index(object(), switch))
        else:
            pipe.send(switch.is_enabled())


class Worker:
    """A worker as vLLM's executors start it."""

    def __init__(self, levels: Levels | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, levels))
        self._process.start()
        assert self._pipe.poll(60)
        self.first = bool(self._pipe.recv())

    def is_enabled(self) -> bool:
        """What the worker's next step is told."""
        return bool(self._ask("switch"))

    def level(self) -> int:
        """The level of the worker's next step."""
        return int(self._ask("level"))

    def _ask(self, about: str) -> int:
        self._pipe.send(about)
        assert self._pipe.poll(20)
        answer: int = self._pipe.recv()
        return answer

    def stop(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()


@contextmanager
def workers(number: int, levels: Levels | None = None) -> Iterator[list[Worker]]:
    """Workers that end with the context."""
    started: list[Worker] = []
    try:
        for _ in range(number):
            started.append(Worker(levels))
        yield started
    finally:
        for worker in started:
            worker.stop()
