"""Time to first token and per token in vLLM on an NVIDIA GPU, afbs beside stock backends.

    python -m benchmarks.serving_gpu --output results.csv

The model has Llama-3.1-8B's shapes and random weights, whose attention has no structure: nearly
every key block weighs the same, so a head's tau is the share of blocks that it keeps. One tau for
all heads thus sets the density; nothing else differs from serving a tuned profile.

FLASH_ATTN runs twice: with its default pages of 16 tokens, and with pages of 128, which are the
default of afbs and make FLASH_ATTN faster on long prompts. Every speed-up is over the faster one.
"""

import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.engine import Decode, Job, run_job
from benchmarks.profiles import uniform_profile
from benchmarks.timing import ratio_row
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 140000,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHORT = (512, 1024, 2048, 4096)
LONG = (8192, 32768, 65536, 131072)
SPARSE_FROM = 8192
BASELINES: dict[str, int | None] = {"FLASH_ATTN": None, "FLASH_ATTN, pages of 128": 128}
"""vLLM's own backend, with the page size that it chooses and with that of afbs."""
DECODES = (Decode(1, 4096), Decode(8, 4096))


def jobs(
    folder: Path,
    lengths: Sequence[int],
    rounds: int,
    densities: Sequence[float],
    kv_cache_dtype: str = "auto",
    decodes: Sequence[Decode] = DECODES,
) -> list[Job]:
    """The engines to compare, the baselines first.

    Args:
        folder: Where the model's configuration and the profiles are written.
        lengths: Tokens of the prompts.
        rounds: Measurements of each prompt.
        densities: Shares of the blocks that afbs keeps, an engine for each.
        kv_cache_dtype: Type of the KV cache, of every engine.
        decodes: Batches whose time per token is measured.
    """
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(folder))
    longest = max(lengths)
    prompts = random_prompts(lengths, LLAMA_8B["vocab_size"])
    everything = list(prompts.values())

    def job(name: str, backend: str, chosen: list[list[int]], **more: Any) -> Job:
        max_model_len = max(longest, *(each.prompt_len for each in decodes), 0) + 256
        return Job(
            name, backend, str(folder), True, max_model_len, chosen, rounds,
            kv_cache_dtype=kv_cache_dtype, **more,
        )  # fmt: skip

    short = [prompt for length, prompt in prompts.items() if length < SPARSE_FROM]
    up_to_32k = [prompt for length, prompt in prompts.items() if SPARSE_FROM <= length <= 32768]
    engines = [
        job(name, "FLASH_ATTN", everything, decodes=list(decodes), page_size=page_size)
        for name, page_size in BASELINES.items()
    ]
    for density in densities:
        path = folder / f"tau{density}.json"
        calibrated = sorted({SPARSE_FROM, longest})
        profile = uniform_profile(fingerprint, density, 1 - density, calibrated)
        write_atomically(path, profile.to_json())
        name = f"afbs tau={density}"
        engines.append(
            job(name, "AFBS", everything, decodes=list(decodes), profile=str(path))
        )  # fmt: skip
    if short or decodes:
        engines.append(job("afbs, no profile", "AFBS", short, decodes=list(decodes)))
    if up_to_32k:
        engines.append(job("TRITON_ATTN", "TRITON_ATTN", up_to_32k))
    return engines


def random_prompts(lengths: Iterable[int], vocab_size: int) -> dict[int, list[int]]:
    """A prompt of random tokens for each length; always the same."""
    draw = random.Random(0)
    return {length: [draw.randrange(10, vocab_size) for _ in range(length)] for length in lengths}


def rows_of(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Makes rows of the figures and of each engine's ratio to the faster baseline that ran."""
    baselines = [result for name, result in results.items() if name in BASELINES]
    rows = []
    for name, result in results.items():
        products = result["block_products"]
        total = products["computed"] + products["skipped"]
        if products["skipped"]:
            density = products["computed"] / total
            rows.append(make_row(f"{name}: density of long prefills", "all", [density], "ratio"))
        for kind, key in (
            ("time to first token", "first_token_seconds"),
            ("time per token", "decode_seconds"),
        ):
            for shape, samples in result[key].items():
                rows.append(make_row(f"{name}: {kind}", shape, samples, "seconds"))
                if name not in BASELINES and baselines:
                    faster = min((each[key][shape] for each in baselines), key=median)
                    what = f"{name}: {kind}, speedup over the faster FLASH_ATTN"
                    rows.append(ratio_row(what, shape, faster, samples))
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=(*SHORT, *LONG))
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2])
    parser.add_argument("--engines", nargs="+", help="run only these engines, by name")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of every engine")
    parser.add_argument("--prefill-only", action="store_true", help="leave out decodes")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        decodes = () if args.prefill_only else DECODES
        engines = jobs(
            Path(folder), args.lengths, args.rounds, args.densities, args.kv_cache_dtype, decodes
        )
        for job in engines:
            if args.engines and job.name not in args.engines:
                continue
            results[job.name] = run_job(job)
            rows = rows_of(results)
            if args.kv_cache_dtype != "auto":
                cache = f"{args.kv_cache_dtype} KV cache"
                rows = [replace(row, shape=f"{row.shape}, {cache}") for row in rows]
            # Written after each engine, so that what was measured outlives a failure.
            report_rows(rows, args.output)


if __name__ == "__main__":
    main()
