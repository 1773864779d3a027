"""A real model with its tuned profile in vLLM on an NVIDIA GPU, beside FLASH_ATTN.

    python -m benchmarks.real_model_gpu --profile profile.json --output results.csv

Measures times to first token and how far the answers move: the next-token distribution after the
prompt and the greedy continuation are compared with FLASH_ATTN's. The difference between FLASH_ATTN
and afbs without a profile comes from rounding alone. The model is so small that dense attention is
faster on an H100, so the dispatcher chooses it. To show what sparsity does to the answers, further
engines are made to run sparse.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.engine import Decode, Job, run_job
from benchmarks.serving_gpu import BASELINES, rows_of
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.demo.assets import prepare, read_token_ids
from vllm_afbs.evaluate import divergence

NUM_ANSWER_TOKENS = 64
DEFAULT_LENGTHS = [7936]


def prompts(
    model_dir: Path, text_file: Path, lengths: Sequence[int], count: int
) -> list[list[int]]:
    """Consecutive stretches of a text, as token ids: ``count`` of each length.

    Raises:
        ValueError: The text is too short.
    """
    token_ids = read_token_ids(model_dir, text_file)
    needed = count * sum(lengths)
    if len(token_ids) < needed:
        raise ValueError(f"{text_file}: at least {needed} tokens expected, got {len(token_ids)}")
    chosen, start = [], 0
    for length in lengths:
        for _ in range(count):
            chosen.append(token_ids[start : start + length])
            start += length
    return chosen


def answer_rows(
    name: str, baseline: str, stock: list[dict[str, Any]], own: list[dict[str, Any]]
) -> list[Row]:
    """How far an engine's answers lie from the stock engine's, over the prompts."""
    pairs = list(zip(stock, own, strict=True))
    tops = [(a["next_token"], b["next_token"]) for a, b in pairs]
    kl = [divergence.kl_divergence(*each) for each in tops]
    variation = [divergence.total_variation(*each) for each in tops]
    rows = [
        make_row(f"{name}: next token, KL to {baseline}", "all", kl, "nats"),
        make_row(f"{name}: next token, total variation", "all", variation, "probability"),
    ]
    agreed = [divergence.agreement_length(a["token_ids"], b["token_ids"]) for a, b in pairs]
    what = f"{name}: greedy tokens agreed, of {NUM_ANSWER_TOKENS}"
    return [*rows, make_row(what, "all", agreed, "tokens")]


def main() -> None:
    """Runs the benchmark."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="by default the demo's SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="text of the prompts; by default the demo's")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=DEFAULT_LENGTHS, help="tokens of the prompts"
    )
    parser.add_argument("--num-prompts", type=int, default=2, help="of each length")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engines", nargs="+", help="only these of the engines, by name")
    args = parser.parse_args()
    model, text = args.model, args.text
    if model is None or text is None:
        assets = prepare()
        model, text = model or assets.model_dir, text or assets.prompt_file
    chosen = prompts(model, text, args.lengths, args.num_prompts)
    longest = max(args.lengths)
    results: dict[str, dict[str, Any]] = {}
    profile = str(args.profile.absolute())
    stock_engines = [(name, "FLASH_ATTN", size, None, None) for name, size in BASELINES.items()]
    for name, backend, page_size, served, way in (
        *stock_engines,
        ("afbs, no profile", "AFBS", None, None, None),
        ("afbs, tuned", "AFBS", None, profile, None),
        ("afbs, tuned, sparse in any case", "AFBS", None, profile, "tiles"),
    ):
        if args.engines and name not in args.engines:
            continue
        job = Job(
            name, backend, str(model), False, longest + NUM_ANSWER_TOKENS, chosen, args.rounds,
            way=way, decodes=[Decode(1, 2048)], profile=served, page_size=page_size,
            num_answer_tokens=NUM_ANSWER_TOKENS,
        )  # fmt: skip
        results[name] = run_job(job)
        report_rows(rows_of(results), args.output)  # outlives a failure of a later engine
    rows = rows_of(results)
    first, *others = results
    for name in others:
        rows += answer_rows(name, first, results[first]["answers"], results[name]["answers"])
    report_rows(rows, args.output)


if __name__ == "__main__":
    main()
