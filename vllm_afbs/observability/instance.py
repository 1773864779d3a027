"""Which server this process belongs to, and the directory that the server's processes share.

Attention runs in worker processes, and routes and ``/metrics`` are served by others. They meet in a
directory:

* ``PROMETHEUS_MULTIPROC_DIR`` if it is set, as vLLM does for several API servers;
* ``VLLM_AFBS_METRICS_DIR`` otherwise. The first process of a server names one if the operator did
  not.

The first process also gives its server an id, which is part of the name of every file that the
server writes. Servers that share a directory therefore do not touch each other's files.

Processes that Python's ``multiprocessing`` starts inherit both names. Other workers, such as Ray's,
do not: they get them with vLLM's configuration (``serving/admission.py``).
"""

import atexit
import multiprocessing
import os
import platform
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

DIRECTORY_VARIABLE = "VLLM_AFBS_METRICS_DIR"
_SERVER_VARIABLE = "VLLM_AFBS_SERVER"
_DIRECTORY_PREFIX = "vllm-afbs-"
_ID = re.compile(r"(?P<host>[A-Za-z0-9]+)-(?P<pid>\d+)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Instance:
    """One server.

    Attributes:
        server_id: ``HOST-PID-RANDOM`` of its first process.
        directory: What its processes share; it need not exist yet.
    """

    server_id: str
    directory: str

    @property
    def is_of_this_host(self) -> bool:
        """Whether its first process runs on this machine, or in this container."""
        return self.server_id.rsplit("-", 2)[0] == host()

    def file(self, kind: str) -> Path:
        """The path of one of its files."""
        return Path(self.directory) / f"afbs-{kind}-{self.server_id}"


_first: tuple[int, str] | None = None
"""Process id and server id if this process, or the one that forked it, is a server's first."""
_joined: Instance | None = None
"""What came with the configuration, in a worker that did not inherit it."""


def start() -> bool:
    """Names the server and its directory, unless this process is a child of the server's first.

    Returns:
        Whether this process did so. Repeated calls change nothing.
    """
    global _first
    inherited = os.environ.get(_SERVER_VARIABLE)
    # A program that has imported vLLM may start several servers, each by a command line of its own.
    # These are no children; only what multiprocessing starts is, which has another name.
    is_child = multiprocessing.current_process().name != "MainProcess"
    if _first is not None or (inherited is not None and is_child):
        return False
    server_id = f"{host()}-{os.getpid()}-{secrets.token_hex(8)}"
    _first = (os.getpid(), server_id)
    os.environ[_SERVER_VARIABLE] = server_id
    named = os.environ.get(DIRECTORY_VARIABLE)
    if named is None or Path(named).name == f"{_DIRECTORY_PREFIX}{inherited}":
        # Most processes that import vLLM never serve, so the first one that writes makes the
        # directory. Its random name keeps other users from making it before.
        directory = Path(_temporary_directory()) / f"{_DIRECTORY_PREFIX}{server_id}"
        os.environ[DIRECTORY_VARIABLE] = str(directory)
        atexit.register(_remove_if_owner, directory, os.getpid())
    return True


def current() -> Instance:
    """This process's server."""
    if _joined is not None:
        return _joined
    start()
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ[DIRECTORY_VARIABLE]
    return Instance(os.environ[_SERVER_VARIABLE], shared)


def join(server: Instance) -> None:
    """Makes this process one of a server's that it is no child of.

    Only the first call counts: vLLM may build a draft model's configuration anew in the worker.
    """
    global _joined
    if _joined is None and server != current():
        _joined = server


def is_first_process() -> bool:
    """Whether this process is the first one of its server."""
    return _first == (os.getpid(), current().server_id)


def host() -> str:
    """This machine's name, or this container's, without its punctuation."""
    return re.sub("[^A-Za-z0-9]", "", platform.node()) or "host"


def has_ended(server_id: str) -> bool:
    """Whether a server's first process ran on this machine and has ended."""
    parts = _ID.fullmatch(server_id)
    if parts is None or parts["host"] != host() or server_id == current().server_id:
        return False
    # Containers reuse process ids, so this process's id was an earlier server's.
    return int(parts["pid"]) == os.getpid() or not is_running(int(parts["pid"]))


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none can be written; whoever writes says so
        return "/tmp"


def _remove_if_owner(directory: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker also runs its parent's exit handlers
        shutil.rmtree(directory, ignore_errors=True)
