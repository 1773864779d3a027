"""Starting and ending a server, with small stand-ins for vLLM."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from vllm_afbs.demo.server import HOST, ServerError, free_port, running_server

# Answers every GET, and leaves a child in its process group that ignores SIGTERM.
SERVER = textwrap.dedent("""
    import http.server, subprocess, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", ignore])
    print(child.pid, flush=True)
    _, _, host, _, port = sys.argv
    http.server.HTTPServer((host, int(port)), Handler).serve_forever()
""")


def script(source: str) -> list[str]:
    return [sys.executable, "-c", source]


def is_running(pid: int) -> bool:
    """Whether a process is alive; a zombie that nobody has waited for is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind((HOST, free_port()))


def test_server_answers_and_its_whole_group_ends(tmp_path: Path) -> None:
    log_file = tmp_path / "server.log"
    with running_server(script(SERVER), os.environ, log_file) as url:
        assert url.startswith(f"http://{HOST}:")
        assert httpx.get(f"{url}/health").is_success
        child = int(log_file.read_text().split()[0])
        assert is_running(child)
    assert ends(child)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_interrupt_ends_the_server(tmp_path: Path) -> None:
    log_file = tmp_path / "server.log"

    def interrupted() -> None:
        with running_server(script(SERVER), os.environ, log_file):
            assert is_running(int(log_file.read_text().split()[0]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ends(int(log_file.read_text().split()[0]))


def test_server_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    command = script("import sys; print('bad profile: tau'); sys.exit(3)")
    with (
        pytest.raises(ServerError) as failure,
        running_server(command, os.environ, tmp_path / "server.log"),
    ):
        pass
    first, *tail = str(failure.value).splitlines()
    assert "ended with status 3" in first
    assert str(tmp_path / "server.log") in first
    assert tail == ["  bad profile: tau"]


def test_silent_server_times_out_and_ends(tmp_path: Path) -> None:
    source = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    log_file = tmp_path / "server.log"
    with (
        pytest.raises(ServerError, match=r"no answer within 2 s"),
        running_server(script(source), os.environ, log_file, start_seconds=2),
    ):
        pass
    assert ends(int(log_file.read_text()))


def test_sigterm_to_the_demo_ends_its_server(tmp_path: Path) -> None:
    """The demo's own way: a SIGTERM becomes SystemExit, so the block is left in order."""
    demo = textwrap.dedent(f"""
        import os, signal, sys, time
        from pathlib import Path
        from vllm_afbs.demo.__main__ import end_in_order
        from vllm_afbs.demo.server import running_server
        end_in_order()
        with running_server({script(SERVER)!r}, os.environ, Path("server.log")):
            print("up", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen(script(demo), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        child = int((tmp_path / "server.log").read_text().split()[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 128 + signal.SIGTERM
    assert ends(child)
