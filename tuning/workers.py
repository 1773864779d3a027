"""Tuning layers side by side in Ray workers: on this machine, or on a cluster's machines and GPUs.

A worker searches one layer at a time, which needs nothing of the other layers. It is a Ray actor,
so it keeps its GPU and its imports from layer to layer. It streams every finished step to the job's
own process, which alone writes the journal. A kill therefore loses only the step that each worker
is in. Ray is an extra, and only this module imports it.
"""

import itertools
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from vllm_afbs.captures import Capture
from vllm_afbs.errors import InputError, one_line
from vllm_afbs.tuning.journal import Entry, Journal, Steps
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings

Event = Entry | float
"""A finished step, or a further share of the layer that is done."""
_CONNECT_SECONDS = 10.0
_OBJECT_STORE_BYTES = 100 << 20  # steps are small, and Ray's default is a third of the memory
_LOCAL_ONLY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # No other switch makes Ray on Linux listen on the loopback interface only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True)
class Share:
    """How the machines are shared out among workers.

    Attributes:
        count: Layers tuned at once.
        threads: CPU threads of each.
        gpus: GPUs of each, 0 or 1: an evaluator assumes that it has a GPU to itself.
    """

    count: int
    threads: int
    gpus: int

    @classmethod
    def of(cls, count: int | None, machines: Sequence[Mapping[str, float]]) -> "Share":
        """Shares out machines.

        Args:
            count: Layers to tune at once; None for one per GPU, or without GPUs one per machine.
            machines: Number of each machine's ``CPU`` and ``GPU``, as Ray reports them.

        Raises:
            InputError: There is nothing to compute on, or fewer GPUs than ``count``.
        """
        usable = [machine for machine in machines if machine.get("CPU", 0) >= 1]
        with_gpus = [machine for machine in usable if machine.get("GPU", 0) >= 1]
        usable = with_gpus or usable
        if not usable:
            raise InputError("--ray-address: a cluster with free CPUs expected, it has none")
        gpus = sum(int(machine["GPU"]) for machine in with_gpus)
        count = count or gpus or len(usable)
        if gpus and count > gpus:
            raise InputError(f"--workers: at most {gpus} expected, one per GPU, got {count}")
        cpus = [int(machine["CPU"]) for machine in usable]
        # At most what the smallest machine has, or Ray would wait for a larger one forever.
        return cls(count, max(1, min(sum(cpus) // count, *cpus)), min(gpus, 1))


class LayerPool:
    """Ray, started or connected to for the length of a ``with``.

    Args:
        count: Layers to tune at once, see ``Share.of``; required without an address.
        address: Of a running cluster, ``auto`` or HOST:PORT; None for a Ray on this machine.
    """

    def __init__(self, count: int | None, address: str | None) -> None:
        self._count = count
        self._address = address
        self._exit = ExitStack()

    def __enter__(self) -> "LayerPool":
        """Starts Ray or connects to it.

        Raises:
            InputError: Ray is not installed, no cluster answers, or ``count`` is too large.
            OSError: Ray cannot be started.
        """
        with ExitStack() as stack:
            if self._address is None:
                os.environ.update(_LOCAL_ONLY)  # read when Ray is imported
            ray = _import_ray()
            if self._address is None:
                _start(ray, self._count, stack)
            else:
                _connect(ray, self._address, stack)
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._share = Share.of(self._count, machines)
            actor = ray.remote(num_cpus=self._share.threads, num_gpus=self._share.gpus)(_Worker)
            self._workers = [actor.remote() for _ in range(self._share.count)]
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def search(
        self,
        settings: SearchSettings,
        layers: Sequence[int],
        tolerances: Mapping[int, Sequence[float]],
        capture: Capture,
        journal: Journal,
        on_progress: Callable[[float], None],
    ) -> None:
        """Does every step of the layers' searches that the journal does not hold yet.

        Args:
            settings: The job's settings.
            layers: Which layers.
            tolerances: The tolerances that each layer is to be settled at; none to search only.
            capture: Their Q, K and V, in a directory that every worker can read.
            journal: Gets the steps as they are finished.
            on_progress: Called with each further share of a layer that is done.

        Raises:
            InputError: A worker cannot read the captures.
            OSError: A worker, or the machine that it was on, is gone.
        """
        ray = _import_ray()
        # The workers are other processes: give them the memory that the captured model took.
        torch.cuda.empty_cache()
        capture = replace(capture, directory=capture.directory.resolve())
        idle = list(self._workers)
        waiting = iter(layers)
        running: dict[Any, tuple[int, Any]] = {}
        while True:
            for layer in itertools.islice(waiting, len(idle)):
                known = journal.entries(f"layer {layer} ")
                worker = idle.pop()
                stream = worker.search.remote(
                    settings, layer, tolerances.get(layer, ()), capture, known, self._share.threads
                )
                running[stream] = layer, worker
            if not running:
                return
            (stream, *_), _ = ray.wait(list(running), fetch_local=False)
            layer, worker = running[stream]
            event = _next_event(stream, layer)
            if event is None:
                del running[stream]
                idle.append(worker)
            elif isinstance(event, float):
                on_progress(event)
            else:
                journal.add(event)


def search_layer(
    settings: SearchSettings,
    layer: int,
    tolerances: Sequence[float],
    capture: Capture,
    known: list[Entry],
    threads: int,
) -> Iterator[Event]:
    """Searches a layer in a worker; yields each finished step and share as it comes.

    Args:
        settings: The job's settings.
        layer: Which layer.
        tolerances: What to settle it at.
        capture: Its Q, K and V.
        known: Its steps that were done before, which are replayed and not yielded.
        threads: CPU threads to use.
    """
    torch.set_num_threads(threads)
    events: SimpleQueue[Event | None] = SimpleQueue()
    search = LayerSearch(settings, layer, capture, Steps(known, events.put), events.put)
    # The search reports by callback, which a generator cannot yield from: hence the thread.
    with ThreadPoolExecutor(max_workers=1) as thread:
        running = thread.submit(search.settled, tolerances)
        running.add_done_callback(lambda _: events.put(None))
        while (event := events.get()) is not None:
            yield event
        running.result()


class _Worker:
    """Searches one layer after another."""

    def search(self, *args: Any) -> Iterator[Event]:
        """Does what ``search_layer`` does, then frees the GPU memory that it took."""
        yield from search_layer(*args)
        torch.cuda.empty_cache()


def _next_event(stream: Any, layer: int) -> Event | None:
    """The next event of a layer's worker; None if it has ended."""
    import ray

    try:
        return ray.get(next(stream))  # type: ignore[no-any-return]
    except StopIteration:
        return None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | OSError):
            # As the search raised it, without Ray's traceback.
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise OSError(f"the worker of layer {layer} is gone: {one_line(error)}") from None


def _start(ray: Any, count: int | None, stack: ExitStack) -> None:
    """Starts a Ray on this machine, ended by the stack."""
    folder = tempfile.TemporaryDirectory(prefix="afbs-ray-", ignore_cleanup_errors=True)
    stack.enter_context(folder)
    stack.callback(ray.shutdown)
    try:
        ray.init(
            address="local",
            num_cpus=max(count or 1, torch.get_num_threads()),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder.name,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"cannot start Ray: {one_line(error)}") from None


def _connect(ray: Any, address: str, stack: ExitStack) -> None:
    """Connects to a running cluster, left by the stack."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            # Ray itself would try for two minutes and then end the process.
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise InputError(f"--ray-address: {address}: {one_line(error)}") from None
    stack.callback(ray.shutdown)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--ray-address: {address}: {one_line(error)} (if the cluster asks for a token, set "
            "RAY_AUTH_MODE=token)"
        ) from None


def _import_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError(
            "--workers, --ray-address: the extra 'ray' expected: pip install 'vllm-afbs[ray]'"
        ) from None
    return ray
