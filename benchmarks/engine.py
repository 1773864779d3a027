"""Runs one vLLM engine in a process of its own and measures it.

    python -m benchmarks.engine job.json result.json

Other benchmarks start it with ``run_job``.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_afbs.serving.settings import PROFILE_VARIABLE

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # keeps messages between processes out of the times
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
MAX_BATCHED_TOKENS = 16384
SHORT_TOKENS = 8192


@dataclass(frozen=True)
class Decode:
    """A batch of prompts of one length, each of which is continued by ``num_tokens``."""

    batch: int
    prompt_len: int
    num_tokens: int = 129

    @property
    def name(self) -> str:
        """Name in the report: batch x prompt length."""
        return f"{self.batch}x{self.prompt_len}"


@dataclass(frozen=True)
class Job:
    """What one engine does.

    Attributes:
        name: Name in the report.
        backend: Attention backend, as vLLM names it.
        model: Directory with a model or, for random weights, only its ``config.json``.
        random_weights: Whether to draw the weights at random.
        max_model_len: Longest context.
        prompts: Token ids of the prompts whose time to first token is measured.
        rounds: Measurements of each prompt.
        decodes: Batches whose time per token is measured.
        profile: Profile for the afbs backend; None to run without one.
        num_answer_tokens: Greedy tokens kept of each prompt's answer; 0 for random weights.
        way: Way of sparse prefill to take wherever the profile is sparse; the dispatcher's if None.
        settings: Settings of afbs in ``additional_config``.
        speculative: vLLM's ``speculative_config``; None to decode token by token.
        page_size: Tokens of a page of the KV cache; the backend's own default if None.
        kv_cache_dtype: Type of the KV cache, as vLLM names it.
        without_experts: Whether the model has Qwen3-Next's class and no experts, as Qwen3.5 has.
    """

    name: str
    backend: str
    model: str
    random_weights: bool
    max_model_len: int
    prompts: list[list[int]]
    rounds: int
    decodes: list[Decode] = field(default_factory=list)
    profile: str | None = None
    num_answer_tokens: int = 0
    way: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    speculative: dict[str, Any] | None = None
    page_size: int | None = None
    kv_cache_dtype: str = "auto"
    without_experts: bool = False


def run_job(job: Job) -> dict[str, Any]:
    """Runs an engine in a process of its own, which frees the GPU for the next one.

    Returns:
        ``first_token_seconds``: per prompt length, the samples; ``decode_seconds``: per decode,
        seconds per token; ``answers``: per prompt, ``token_ids`` and ``next_token``, the
        likeliest first tokens' probabilities; ``block_products``: ``computed`` and ``skipped``;
        ``sparse_layers``: how many layers skipped some.

    Raises:
        RuntimeError: The engine failed; the message ends with its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file, log = (Path(folder) / n for n in ("job.json", "result.json", "log"))
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        environment = os.environ | ENVIRONMENT
        environment.pop(PROFILE_VARIABLE, None)
        if job.profile:
            environment[PROFILE_VARIABLE] = job.profile
        with log.open("wb") as stream:
            done = subprocess.run(
                [sys.executable, "-m", __name__, job_file, result_file],
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{job.name}: {log.read_text(errors='replace')[-4000:]}")
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return result


class Engine:
    """A job's engine, in this process."""

    def __init__(self, job: Job) -> None:
        """Starts the engine."""
        from vllm import LLM

        self._job = job
        if job.way is not None:
            _dispatch_to(job.way)
        if job.without_experts:
            allow_no_experts()
        decode_sizes = sorted({each.batch for each in job.decodes}) or [1]
        decodes = bool(job.decodes or job.num_answer_tokens)
        drafts = job.speculative["num_speculative_tokens"] if job.speculative else 0
        self.llm = LLM(
            model=job.model,
            load_format="dummy" if job.random_weights else "auto",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=job.max_model_len,
            max_num_batched_tokens=min(MAX_BATCHED_TOKENS, job.max_model_len),
            max_num_seqs=max(*decode_sizes, len(job.prompts)),
            enable_prefix_caching=False,
            attention_config={"backend": job.backend},
            block_size=job.page_size,
            kv_cache_dtype=job.kv_cache_dtype,
            speculative_config=job.speculative,
            # FlashInfer's kernel for linear attention would be compiled at the first prompt.
            additional_config={"afbs": job.settings, "gdn_prefill_backend": "triton"},
            # Prefills run eagerly, decodes from graphs; nothing waits for a compiler.
            compilation_config={
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY" if decodes else "NONE",
                "cudagraph_capture_sizes": [size * (1 + drafts) for size in decode_sizes],
            },
        )
        if job.random_weights:
            self.llm.apply_model(_draw_weights)

    def generate(
        self, prompts: list[list[int]], num_tokens: int, logprobs: int | None = None
    ) -> tuple[float, list[Any]]:
        """Generates greedily; returns the seconds and each prompt's output."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=logprobs,
        )
        start = time.perf_counter()
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False
        )
        return time.perf_counter() - start, [output.outputs[0] for output in outputs]

    def first_token_seconds(self) -> dict[str, list[float]]:
        """Times each prompt's first token, by prompt length."""
        samples: dict[str, list[float]] = {}
        for prompt in self._job.prompts:
            self.generate([prompt], 1)
            # Short prompts are cheap, and the differences between them small.
            rounds = self._job.rounds * (5 if len(prompt) <= SHORT_TOKENS else 1)
            samples.setdefault(str(len(prompt)), []).extend(
                self.generate([prompt], 1)[0] for _ in range(rounds)
            )
        return samples

    def decode_seconds(self) -> dict[str, list[float]]:
        """Times one token of each batch, by the batch's name."""
        samples: dict[str, list[float]] = {}
        for decode in self._job.decodes:
            self.time_decode(decode)
            samples[decode.name] = [self.time_decode(decode) for _ in range(self._job.rounds)]
        return samples

    def time_decode(self, decode: Decode) -> float:
        """Measures the seconds of one token after the first."""
        # Prompts differ, because equal ones would share pages of the cache.
        prompts = [
            [(7 * row + 3 * column) % 997 for column in range(decode.prompt_len)]
            for row in range(decode.batch)
        ]
        first, _ = self.generate(prompts, 1)
        whole, _ = self.generate(prompts, decode.num_tokens)
        return (whole - first) / (decode.num_tokens - 1)

    def answers(self) -> list[dict[str, Any]]:
        """Each prompt's greedy tokens, and the likeliest first tokens' probabilities."""
        if not self._job.num_answer_tokens:
            return []
        answers = []
        # All at once, so that prefills share steps with other prefills and with decodes.
        _, outputs = self.generate(self._job.prompts, self._job.num_answer_tokens, logprobs=20)
        for output in outputs:
            top = {token: math.exp(entry.logprob) for token, entry in output.logprobs[0].items()}
            answers.append({"token_ids": list(output.token_ids), "next_token": top})
        return answers


def _dispatch_to(way: str) -> None:
    from vllm_afbs.backends.cuda import backend

    vars(backend)["fastest_kernel"] = lambda *_: way


def allow_no_experts() -> None:
    """Lets vLLM's class of Qwen3-Next have no layer with experts."""
    from vllm.model_executor.models import qwen3_next

    vars(qwen3_next)["Qwen3NextForCausalLM"].set_moe_parameters = _nothing


def _nothing(_: object) -> None:
    """Replaces a method."""


FLAT = 2.0**-7
"""Scale of normalised queries. It makes all scores nearly equal, whatever tokens have in common."""


def _draw_weights(model: Any) -> None:
    """Draws weights that give a trained model's activations; dummy weights make all scores zero."""
    import torch

    generators: dict[Any, torch.Generator] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        for parameter in module.parameters(recurse=False):
            device = parameter.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
            if "Norm" in kind:
                scale = FLAT if name.endswith("q_norm") else 1.0
                # Gemma's norms, which Qwen3-Next has as well, scale by 1 + weight.
                parameter.data.fill_(scale - 1.0 if kind.startswith("Gemma") else scale)
            else:
                parameter.data.normal_(0.0, 0.02, generator=generator)


def _products() -> dict[str, Any]:
    """The block products so far, and how many layers skipped some."""
    from prometheus_client import REGISTRY

    time.sleep(1.0)  # the reporting thread follows the device
    totals = {"computed": 0.0, "skipped": 0.0}
    layers = set()
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name == "vllm_afbs_block_products_total":
                totals[sample.labels["outcome"]] += sample.value
                if sample.labels["outcome"] == "skipped" and sample.value:
                    layers.add(sample.labels["layer"])
    return {"block_products": totals, "sparse_layers": len(layers)}


def main() -> None:
    """Runs one job."""
    job_file, result_file = (Path(name) for name in sys.argv[1:])
    values = json.loads(job_file.read_text(encoding="utf-8"))
    values["decodes"] = [Decode(**each) for each in values["decodes"]]
    job = Job(**values)
    engine = Engine(job)
    result = {
        "first_token_seconds": engine.first_token_seconds(),
        **_products(),
        "decode_seconds": engine.decode_seconds(),
        "answers": engine.answers(),
    }
    result_file.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
