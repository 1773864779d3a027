"""A real CPU server under a mix of requests: no error, flat memory, exact totals.

    python -m benchmarks.soak --profile profile.json --output soak.csv

Serves the demo's model with this backend and sends it short and long prompts, some of them over
the model's length, several at a time, streamed and not, malformed bodies, and clients that hang up
before or after the first token. Ends with status 1 and a list of what did not hold.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.soak.checks import memory_faults
from benchmarks.soak.client import Client
from benchmarks.soak.plan import (
    MAX_MODEL_LEN,
    describe,
    fill,
    make_plan,
    most_tokens_at_once,
)
from benchmarks.soak.results import rows_of
from benchmarks.soak.run import NUM_CLIENTS, Soak
from vllm_afbs.demo.__main__ import end_in_order
from vllm_afbs.demo.assets import Assets, prepare, read_token_ids
from vllm_afbs.demo.comparison import Arm
from vllm_afbs.demo.server import running_server
from vllm_afbs.profile.file import load_profile

KV_CACHE_GIB = 2
"""Room for every client's longest prompt at once: nothing is preempted and computed anew."""
SAMPLE_SECONDS = 1.0
REQUEST_SECONDS = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the soak; returns the exit status."""
    args = _parser().parse_args(argv)
    end_in_order()
    assets = prepare()
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        return asyncio.run(_run(args, assets, work / "server.log"))


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="of the demo's model")
    parser.add_argument("--minutes", type=float, default=15.0, help="to last at least")
    parser.add_argument("--requests", type=int, default=1100)
    parser.add_argument("--work", type=Path, help="folder for the server's log")
    return parser


@contextmanager
def _server(profile: Path, model_dir: Path, most_tokens: int, log_file: Path) -> Iterator[str]:
    arm = Arm("soak", "afbs", plugins=True, profile=profile)
    command = arm.command(model_dir)
    # A prompt is one step's, whatever runs beside it, so its length tells what it must count.
    command += ["--max-num-batched-tokens", str(max(most_tokens, MAX_MODEL_LEN))]
    command += ["--no-enable-prefix-caching", "--enforce-eager"]  # compiling takes minutes
    environment = arm.environment() | {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        # oneDNN keeps a product for every number of rows that it has seen, up to 1024 of them: it
        # grows for thousands of requests, stock vLLM's as well, and would hide what leaks.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    }
    with running_server(command, environment, log_file) as url:
        yield url


async def _run(args: argparse.Namespace, assets: Assets, log_file: Path) -> int:
    tokens = read_token_ids(assets.model_dir, assets.prompt_file)
    profile = load_profile(args.profile)
    waves = [fill(KV_CACHE_GIB << 30, profile.model), *make_plan(args.requests)]
    print("\n".join(describe(waves)), flush=True)
    most_tokens = most_tokens_at_once(waves, NUM_CLIENTS)
    with _server(args.profile, assets.model_dir, most_tokens, log_file) as url:
        client = Client(url, tokens, REQUEST_SECONDS)
        memory_bytes: list[float] = []
        sampler = asyncio.create_task(_sample_memory(memory_bytes))
        try:
            soak = Soak(client, url, profile)
            started = time.monotonic()
            await soak.run(waves, args.minutes * 60)
            seconds = time.monotonic() - started
        finally:
            sampler.cancel()
            await client.close()
    faults = soak.faults + memory_faults(memory_bytes)
    if "Traceback" in log_file.read_text(encoding="utf-8", errors="replace"):
        faults.append("the server's log holds a traceback")
    report_rows(rows_of(soak, profile, memory_bytes, seconds, len(faults)), args.output)
    print("\n".join(faults) or "Everything held.", flush=True)
    return 1 if faults else 0


async def _sample_memory(into: list[float]) -> None:
    """Adds the server's resident bytes, summed over its processes, once a second.

    This process has no other children, and what they are is asked each time.
    """
    while True:
        total = 0
        for process in psutil.Process().children(recursive=True):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        into.append(total)
        await asyncio.sleep(SAMPLE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
