"""Starts vLLM's process, sends it requests and ends it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_afbs.engine.channel import Channel, ClosedError
from vllm_afbs.errors import InputError

_END_SECONDS = 20.0


def new_log() -> Path:
    """Makes an empty log in the directory for temporary files.

    Raises:
        OSError: It cannot be written.
    """
    descriptor, log_file = tempfile.mkstemp(prefix="vllm-afbs-engine-", suffix=".log")
    os.close(descriptor)
    return Path(log_file)


class EngineProcess:
    """A running ``vllm_afbs.engine.host``, which begins to import vLLM at once.

    Args:
        log_file: Gets all that vLLM prints.

    Attributes:
        log_file: The same.

    Raises:
        OSError: The process cannot be started, or the log cannot be written.
    """

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "vllm_afbs.engine.host", str(theirs.fileno())]
        with log_file.open("ab") as log, theirs:
            # In a session of its own, so that an interrupt reaches the driver alone.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self._channel = Channel(ours)

    def call(self, method: str, **arguments: Any) -> Any:
        """Has a method of ``host.Host`` run.

        Raises:
            InputError: The host or vLLM refuses, fails, or is gone.
        """
        try:
            self._channel.send({"method": method, "arguments": arguments})
            answer = self._channel.receive()
        except ClosedError:
            raise InputError(
                f"vLLM ended unexpectedly (status {self._process.wait(_END_SECONDS)}); its log is "
                f"{self.log_file}"
            ) from None
        if "refused" in answer:
            raise InputError(answer["refused"])
        if "failed" in answer:
            raise InputError(f"vLLM: {answer['failed']}; its log is {self.log_file}")
        return answer["value"]

    def end(self) -> None:
        """Ends the process and its workers."""
        self._channel.close()
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, kind)
            except ProcessLookupError:
                break
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()
