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
from collections.abc import Iterable
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


def jobs(folder: Path, longest: int, rounds: int, densities: list[float]) -> list[Job]:
    """The engines to compare, the baselines first."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(folder))
    lengths = [length for length in (*SHORT, *LONG) if length <= longest]
    prompts = random_prompts(lengths, LLAMA_8B["vocab_size"])
    everything = list(prompts.values())

    def job(name: str, backend: str, chosen: list[list[int]], **more: Any) -> Job:
        return Job(name, backend, str(folder), True, longest + 256, chosen, rounds, **more)

    short = [prompt for length, prompt in prompts.items() if length < SPARSE_FROM]
    up_to_32k = [prompt for length, prompt in prompts.items() if SPARSE_FROM <= length <= 32768]
    engines = [
        job(name, "FLASH_ATTN", everything, decodes=list(DECODES), page_size=page_size)
        for name, page_size in BASELINES.items()
    ]
    for density in densities:
        path = folder / f"tau{density}.json"
        calibrated = sorted({SPARSE_FROM, longest})
        profile = uniform_profile(fingerprint, density, 1 - density, calibrated)
        write_atomically(path, profile.to_json())
        name = f"afbs tau={density}"
        engines.append(
            job(name, "AFBS", everything, decodes=list(DECODES), profile=str(path))
        )  # fmt: skip
    engines.append(job("afbs, no profile", "AFBS", short, decodes=list(DECODES)))
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
    parser.add_argument(
        "--longest", type=int, default=LONG[-1], help="tokens of the longest prompt"
    )
    parser.add_argument("--densities", type=float, nargs="+", default=[0.2])
    parser.add_argument("--engines", nargs="+", help="run only these engines, by name")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(Path(folder), args.longest, args.rounds, args.densities):
            if args.engines and job.name not in args.engines:
                continue
            results[job.name] = run_job(job)
            # Written after each engine, so that what was measured outlives a failure.
            report_rows(rows_of(results), args.output)


if __name__ == "__main__":
    main()
