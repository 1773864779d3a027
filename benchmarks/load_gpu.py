"""``vllm bench serve``: long prompts from several clients at once, afbs beside FLASH_ATTN.

    python -m benchmarks.load_gpu --output results.csv

Three servers run one after the other, with their default scheduler and no prefix cache. The model
has Llama-3.1-8B's shapes, random weights, and SmolLM2's tokenizer, which vLLM's client needs to
make random prompts. One tau for all heads sets the density, as in ``serving_gpu``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.engine import ENVIRONMENT, MAX_BATCHED_TOKENS
from benchmarks.profiles import uniform_profile
from benchmarks.serving_gpu import BASELINES, LLAMA_8B, SPARSE_FROM
from vllm_afbs.commands.client import scrape, total
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.demo.assets import prepare
from vllm_afbs.demo.server import running_server
from vllm_afbs.files import write_atomically
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.serving.settings import PROFILE_VARIABLE

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
OWN = "AFBS"
STD = 0.02
ROOM = 256


def make_checkpoint(folder: Path) -> None:
    """Writes a model with a tokenizer and random weights of a trained model's magnitude."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = open_model(str(prepare().model_dir)).tokenizer()
    tokenizer.save_pretrained(folder)
    values = {key: value for key, value in LLAMA_8B.items() if key != "architectures"}
    config = LlamaConfig(**values | {"vocab_size": len(tokenizer), "initializer_range": STD})
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the servers take nearly all of the GPU


def measure(
    folder: Path, name: str, page_size: int | None, profile: Path | None, args: argparse.Namespace
) -> Any:
    """What vLLM's client found, and the block products that were computed and skipped."""
    backend = OWN if name == OWN else "FLASH_ATTN"
    environment = os.environ | ENVIRONMENT
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server's engine is another process
    if profile is not None:
        environment[PROFILE_VARIABLE] = str(profile)
    server = [
        *VLLM, "serve", str(folder), "--attention-backend", backend, "--no-enable-prefix-caching",
        "--max-model-len", str(longest(args)), "--max-num-batched-tokens", str(MAX_BATCHED_TOKENS),
        # Prefills run eagerly, decodes from graphs; nothing waits for a compiler.
        "--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}),
    ]  # fmt: skip
    if page_size is not None:
        server += ["--block-size", str(page_size)]
    log = folder / f"{name}.log"
    with running_server(server, environment, log) as url:
        client = [
            *VLLM, "bench", "serve", "--base-url", url, "--model", str(folder), "--seed", "0",
            "--dataset-name", "random", "--random-input-len", str(args.input_tokens),
            "--random-output-len", str(args.output_tokens), "--ignore-eos",
            "--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency),
            "--save-result", "--save-detailed", "--result-dir", str(folder),
            "--result-filename", f"{name}.json",
        ]  # fmt: skip
        done = subprocess.run(client, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"vllm bench serve: {(done.stdout + done.stderr)[-3000:]}")
        counters = scrape(url)
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if errors := [error for error in result["errors"] if error]:
        raise RuntimeError(f"{name}: {len(errors)} requests failed: {errors[0]}")
    products = {
        outcome: total(counters, "vllm_afbs_block_products_total", outcome=outcome)
        for outcome in ("computed", "skipped")
    }
    return result | {"products": products}


def longest(args: argparse.Namespace) -> int:
    """Most tokens of a request, with room for random prompts that turn out longer."""
    return int(args.input_tokens + args.output_tokens + ROOM)


def rows_of(results: Mapping[str, Any], shape: str) -> list[Row]:
    """Makes rows of the figures, and of how far afbs is ahead of the better baseline."""
    rows = []
    baselines = [result for name, result in results.items() if name in BASELINES]
    most_requests = max(each["request_throughput"] for each in baselines)
    soonest_ms = min(each["median_ttft_ms"] for each in baselines)
    for name, result in results.items():
        total = sum(result["products"].values())
        if total:
            density = result["products"]["computed"] / total
            rows.append(make_row(f"{name}: density", shape, [density], "ratio"))
        gaps = [gap for each in result["itls"] for gap in each]
        for what, samples in (("time to first token", result["ttfts"]), ("token gap", gaps)):
            rows.append(make_row(f"{name}: {what}", shape, samples, "seconds"))
        rate = result["request_throughput"]
        rows.append(make_row(f"{name}: requests", shape, [rate], "per second"))
        if name not in BASELINES:
            what = f"{name}: requests over the better FLASH_ATTN's"
            rows.append(make_row(what, shape, [rate / most_requests], "ratio"))
            what = f"{name}: median time to first token, speedup over the faster FLASH_ATTN"
            rows.append(make_row(what, shape, [soonest_ms / result["median_ttft_ms"]], "ratio"))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--input-tokens", type=int, default=32768)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--density", type=float, default=0.2)
    args = parser.parse_args(argv)
    shape = f"{args.input_tokens}+{args.output_tokens} x{args.concurrency}"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        fingerprint = open_model(name).fingerprint
        path = folder / "profile.json"
        write_atomically(path, _profile(fingerprint, args).to_json())
        servers = [(server, page_size, None) for server, page_size in BASELINES.items()]
        for server, page_size, profile in (*servers, (OWN, None, path)):
            results[server] = measure(folder, server, page_size, profile, args)
            report_rows(rows_of(results, shape), args.output)


def _profile(fingerprint: ModelFingerprint, args: argparse.Namespace) -> Any:
    lengths = [SPARSE_FROM, max(longest(args), 2 * SPARSE_FROM)]
    return uniform_profile(fingerprint, args.density, 1 - args.density, lengths)


if __name__ == "__main__":
    main()
