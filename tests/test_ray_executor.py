"""``vllm serve --distributed-executor-backend ray``: off is off in a worker that Ray starts.

vLLM's CPU platform names no resource that Ray schedules workers by, so vLLM refuses Ray on a CPU.
Here a platform plugin names one, ``GPU``, of which Ray is told that the machine has one. All that
runs after that is vLLM's own: its executor, Ray's actor, and the worker in it.
"""

import json
import os
import tempfile
from pathlib import Path

import httpx
import pytest

from tests.models import save_small_model
from tests.profiles import SMALL_MODEL, uniform_profile
from vllm_afbs.commands.client import Counters, complete, growth, scrape, total
from vllm_afbs.demo.server import SERVER_ENVIRONMENT, running_server, vllm_command
from vllm_afbs.files import write_atomically
from vllm_afbs.observability import instance

pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-afbs[ray]'")

PROMPT_LEN, BLOCK = 900, 32
PLUGIN = """
def platform():
    from vllm.platforms.interface import Platform

    Platform.ray_device_key = "GPU"
"""


def install_plugin(directory: Path) -> None:
    """Makes vLLM processes with this directory on their path find the plugin ``ray_on_cpu``."""
    information = directory / "ray_on_cpu-1.0.dist-info"
    information.mkdir(parents=True)
    (directory / "ray_on_cpu.py").write_text(PLUGIN)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-on-cpu\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:platform\n"
    )


def server_environment(plugins: Path, ray_directory: str) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        # The server names its own, which Ray's processes are not told by the environment alone.
        if name not in (instance.DIRECTORY_VARIABLE, instance._SERVER_VARIABLE)
    }
    paths = [str(plugins), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **inherited,
        **SERVER_ENVIRONMENT,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other tests run beside it
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_PLUGINS": "afbs,ray_on_cpu",
        "RAY_ADDRESS": "local",  # never a cluster that somebody else runs on this machine
        "RAY_TMPDIR": ray_directory,
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2, "GPU": 1}),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback interface only
    }


def serve_command(directory: Path) -> list[str]:
    model = save_small_model(directory / "model")
    profile = uniform_profile(SMALL_MODEL, 0.5, min_seq_len=320, block_q=BLOCK, block_k=BLOCK)
    write_atomically(directory / "profile.json", profile.to_json())
    settings = {"afbs": {"profile": str(directory / "profile.json")}}
    return [
        *vllm_command(), "serve", str(model),
        "--distributed-executor-backend", "ray",
        "--attention-backend", "afbs",
        "--additional-config", json.dumps(settings),
        "--dtype", "float32",
        "--max-model-len", "1024",
        "--served-model-name", "model",
        "--enforce-eager",
    ]  # fmt: skip


def test_off_is_off_in_a_worker_of_the_ray_executor(tmp_path: Path) -> None:
    install_plugin(tmp_path / "plugins")
    command, log_file = serve_command(tmp_path), tmp_path / "server.log"

    def grown_by_a_prompt(factor: int) -> Counters:
        before = scrape(url)
        complete(url, "model", [factor * n % 250 for n in range(PROMPT_LEN)], 1)
        return growth(before, scrape(url))

    with (
        # Ray's sockets are below it, and a socket's path has at most 107 characters.
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_directory,
        running_server(
            command, server_environment(tmp_path / "plugins", ray_directory), log_file
        ) as url,
    ):
        assert "RayWorkerProc" in log_file.read_text()
        tokens, num_tokens = "vllm_afbs_prefill_tokens_total", SMALL_MODEL.num_layers * PROMPT_LEN
        assert total(grown_by_a_prompt(7), tokens, path="sparse") == num_tokens

        off = httpx.post(f"{url}/afbs/disable", timeout=30).json()
        assert off["enabled"] is False
        assert (off["num_workers"], off["num_acknowledged"]) == (1, 1)
        assert off["pending"] is None
        grown = grown_by_a_prompt(11)
        assert total(grown, tokens, path="sparse") == 0
        assert total(grown, tokens, path="dense") == num_tokens
        fallbacks = "vllm_afbs_dense_fallbacks_total"
        assert total(grown, fallbacks, reason="disabled") == SMALL_MODEL.num_layers

        on = httpx.post(f"{url}/afbs/enable", timeout=30).json()
        assert on["enabled"] is True
        assert (on["num_workers"], on["num_acknowledged"]) == (1, 1)
        assert total(grown_by_a_prompt(13), tokens, path="sparse") == num_tokens
