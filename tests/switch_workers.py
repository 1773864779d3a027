"""Workers of a server in processes of their own, without vLLM, which takes seconds to import."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from vllm_afbs.observability import kill_switch, metrics

# vLLM resolves its platform, and so calls this, when a spawned process begins to unpickle.
metrics.publish()


def work(pipe: Connection) -> None:
    """Tells, whenever it is asked, whether a step may run sparse."""
    switch = kill_switch.KillSwitch()
    pipe.send(switch.is_enabled())
    while pipe.recv():
        pipe.send(switch.is_enabled())


class Worker:
    """A worker as vLLM's executors start it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,))
        self._process.start()
        assert self._pipe.poll(60)
        self.first = bool(self._pipe.recv())

    def is_enabled(self) -> bool:
        """What the worker's next step is told."""
        self._pipe.send(True)
        assert self._pipe.poll(20)
        return bool(self._pipe.recv())

    def stop(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.join()


@contextmanager
def workers(number: int) -> Iterator[list[Worker]]:
    """Workers that end with the context."""
    started: list[Worker] = []
    try:
        for _ in range(number):
            started.append(Worker())
        yield started
    finally:
        for worker in started:
            worker.stop()
