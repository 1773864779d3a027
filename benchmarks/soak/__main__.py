"""A real CPU server under a mix of requests: no error, flat memory, exact totals.

    python -m benchmarks.soak --profile profile.json --output soak.csv

Serves the demo's model with the afbs backend. Several clients at a time send short and long
prompts, some longer than the model allows, some streamed, and malformed bodies; some clients hang
up before or after the first token. If a check fails, the exit status is 1 and the faults are
listed.
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
"""Room for every client's longest prompt at once, so that nothing is preempted."""
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
    parser.add_argument("--profile", type=Path, required=True, help="a profile of the demo's model")
    parser.add_argument("--minutes", type=float, default=15.0, help="shortest duration")
    parser.add_argument("--requests", type=int, default=1100)
    parser.add_argument("--work", type=Path, help="folder for the server's log")
    return parser


@contextmanager
def _server(profile: Path, model_dir: Path, most_tokens: int, log_file: Path) -> Iterator[str]:
    arm = Arm("soak", "afbs", plugins=True, profile=profile)
    command = arm.command(model_dir)
    # Every prompt fits into one step, so that its length alone determines what is counted.
    command += ["--max-num-batched-tokens", str(max(most_tokens, MAX_MODEL_LEN))]
    command += ["--no-enable-prefix-caching", "--enforce-eager"]  # compiling takes minutes
    environment = arm.environment() | {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        # oneDNN caches a kernel for every number of rows that it has seen, up to 1024 of them. With
        # stock vLLM, too, the cache grows for thousands of requests, which would hide a leak.
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
    """Appends the resident bytes of all the server's processes once a second.

    The server's processes are this one's only children. They are listed anew each time.
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
