"""vLLM's process: ``python -m vllm_afbs.engine.host DESCRIPTOR`` obeys what comes over a socket.

Every request names a method of ``Host``. The answer holds its value, or why vLLM or we refuse.
"""

import gc
import hashlib
import json
import os
import socket
import sys
import traceback
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vllm_afbs import compat
from vllm_afbs.check.refusals import RefusedError
from vllm_afbs.engine.channel import Channel, ClosedError
from vllm_afbs.errors import InputError, one_line
from vllm_afbs.observability import metric_files
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.layers import full_layers, tunable_layers
from vllm_afbs.serving.settings import PROFILE_VARIABLE

_REFUSALS = (InputError, ProfileError, RefusedError)
_PRODUCTS, _FALLBACKS = "vllm_afbs_block_products", "vllm_afbs_dense_fallbacks"
PROMPTS_AT_ONCE = 4
"""Prompts of the greatest length that the cache of a CPU holds."""
LEAST_CACHE_BYTES = 1 << 28


class Host:
    """One engine, described first and loaded later."""

    def __init__(self) -> None:
        self._arguments: Any = None
        self._config: Any = None
        self._adapters: dict[str | None, Any] = {}
        self._llm: Any = None

    def describe(self, arguments: list[str], with_adapters: bool) -> dict[str, Any]:
        """Reads the model's configuration.

        Args:
            arguments: What ``vllm serve`` would be given.
            with_adapters: Whether its LoRA adapters are used.
        """
        from vllm_afbs.check.layers import as_served
        from vllm_afbs.engine.adapters import digests
        from vllm_afbs.engine.arguments import parse

        parsed = parse(arguments, with_adapters)
        self._arguments = parsed.engine
        self._adapters = {each.lora_name: each for each in parsed.adapters}
        config = self._config = as_served(self._arguments)
        model = config.model_config
        return {
            "unused": parsed.unused,
            "adapters": digests(parsed.adapters, config.lora_config),
            "model": model.model,
            "revision": model.revision,
            "tokenizer": model.tokenizer,
            "fingerprint": ModelFingerprint.from_config(model.hf_config).model_dump(),
            "full_layers": full_layers(model.hf_text_config),
            "tunable_layers": tunable_layers(model.hf_text_config),
            "max_model_len": int(model.max_model_len),
            "quantization": model.quantization,
            "kv_cache_dtype": str(config.cache_config.cache_dtype),
            "version": compat.installed_version(),
            "num_ranks": config.parallel_config.world_size,
            "cache_bytes": _cache_bytes(config),
            "digest": _digest(config),
            "eos_token_id": model.hf_text_config.eos_token_id,
        }

    def load(
        self, gpu_memory_utilization: float | None, block_k: int | None
    ) -> list[dict[str, Any]]:
        """Loads the model that was described.

        Args:
            gpu_memory_utilization: Share of the GPU that vLLM may take; None for what it was given.
            block_k: Keys of the key blocks that it will be given; None for pages of any size.

        Returns:
            For each of vLLM's workers, what ``DrivenWorker.afbs_layers`` says.
        """
        from vllm import LLM

        gc.freeze()  # what was imported is never garbage, and collections would walk all of it
        config = self._config
        model, cache = config.model_config, config.cache_config
        if config.device_config.device_type == "cpu" and cache.kv_cache_memory_bytes is None:
            # vLLM would take nearly all of the machine's memory.
            self._arguments.kv_cache_memory_bytes = PROMPTS_AT_ONCE * _cache_bytes(config)
        if not _stretches_beyond(model.hf_text_config, model.max_model_len):
            # A token is always generated, so one position more has to be allowed than is used.
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
            self._arguments.max_model_len = model.max_model_len + 1
        if gpu_memory_utilization is not None:
            self._arguments.gpu_memory_utilization = gpu_memory_utilization
        own = (self._arguments.additional_config or {}).get("afbs", {})
        self._arguments.additional_config = {"afbs": {**own, "block_k": block_k}}
        self._llm = LLM.from_engine_args(self._arguments)
        return [json.loads(each) for each in self._workers("afbs_layers")]

    def capture(
        self, tokens: list[int], files: dict[str, str], suffixes: list[str]
    ) -> list[dict[str, Any]]:
        """Computes a prompt and writes its layers' Q, K and V.

        Args:
            tokens: The prompt.
            files: The file for each layer, by vLLM's name of it.
            suffixes: Of each tensor-parallel rank's files.

        Returns:
            For each worker, what ``DrivenWorker.afbs_end_recording`` says.
        """
        request = {"files": files, "suffixes": suffixes, "length": len(tokens)}
        self._workers("afbs_begin_recording", json.dumps(request))
        try:
            self._generate([tokens], 1)
        finally:
            ended = self._workers("afbs_end_recording")
        return [json.loads(each) for each in ended]

    def serve(self, profile: str | None, always_sparse: bool) -> dict[str, str]:
        """See ``DrivenWorker.afbs_serve``."""
        dense: dict[str, str] = {}
        for each in self._workers("afbs_serve", profile, always_sparse):
            dense |= json.loads(each)
        return dense

    def score(
        self,
        tokens: list[int],
        positions: list[int],
        keep: str | None,
        against: str | None,
        adapter: str | None,
    ) -> dict[str, Any]:
        """Scores a prompt's tokens at some positions; see ``DrivenWorker.afbs_begin_scoring``.

        The prompt is one of a LoRA adapter, by its name, or of the base model.
        """
        request = {
            "tokens": tokens, "positions": positions, "keep": keep, "against": against,
            "adapter": adapter,
        }  # fmt: skip
        self._workers("afbs_begin_scoring", json.dumps(request))
        try:
            self._generate([tokens], 1, self._adapters.get(adapter))
        finally:
            ended = self._workers("afbs_end_scoring")
        scored: dict[str, Any] = next(json.loads(each) for each in ended if each != "null")
        return scored

    def next_tokens(
        self, prompts: list[list[int]], targets: list[int], top: int
    ) -> list[dict[str, Any]]:
        """The likeliest tokens after each prompt, and the loss of the one that follows.

        Args:
            prompts: Token ids.
            targets: The token that follows each prompt.
            top: How many tokens.
        """
        from vllm import SamplingParams

        # The sampler may take the target only; the log-probabilities are those before that.
        chosen = [
            SamplingParams(
                max_tokens=1, temperature=0.0, logprobs=top, allowed_token_ids=[target],
                detokenize=False,
            )
            for target in targets
        ]  # fmt: skip
        found = []
        for output, target in zip(self._run(prompts, chosen), targets, strict=True):
            ranked = output.logprobs[0]
            likeliest = sorted(ranked.items(), key=lambda each: -each[1].logprob)[:top]
            found.append(
                {
                    "loss": -ranked[target].logprob,
                    "top": [[token, each.logprob] for token, each in likeliest],
                }
            )
        return found

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Continues prompts greedily; a token that ends an answer is its last."""
        return self._generate(prompts, num_tokens)

    def products(self) -> dict[str, float]:
        """Block products so far, by outcome."""
        return {"computed": 0.0, "skipped": 0.0} | self._counted(_PRODUCTS, "outcome")

    def fallbacks(self) -> dict[str, float]:
        """Prefills that layers left dense so far, by reason."""
        return self._counted(_FALLBACKS, "reason")

    def _counted(self, name: str, label: str) -> dict[str, float]:
        self._workers("afbs_finish_reports")
        found: dict[str, float] = defaultdict(float)
        for metric in metric_files.read():
            if metric.name == name:
                for sample in metric.samples:
                    found[sample.labels[label]] += sample.value
        return found

    def _workers(self, method: str, *arguments: Any) -> list[Any]:
        return list(self._llm.collective_rpc(method, args=arguments))

    def _generate(
        self, prompts: Sequence[list[int]], num_tokens: int, adapter: Any = None
    ) -> list[list[int]]:
        from vllm import SamplingParams

        chosen = SamplingParams(max_tokens=num_tokens, temperature=0.0, detokenize=False)
        outputs = self._run(prompts, [chosen] * len(prompts), adapter)
        return [list(output.token_ids) for output in outputs]

    def _run(
        self, prompts: Sequence[list[int]], chosen: Sequence[Any], adapter: Any = None
    ) -> list[Any]:
        asked = [{"prompt_token_ids": tokens} for tokens in prompts]
        outputs = self._llm.generate(asked, list(chosen), use_tqdm=False, lora_request=adapter)
        return [output.outputs[0] for output in outputs]


def _stretches_beyond(text: Any, max_model_len: int) -> bool:
    """Whether vLLM would compute all positions differently for a longer ``max_model_len``."""
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    return rope.get("rope_type") == "longrope" and original == max_model_len


def _cache_bytes(config: Any) -> int:
    """Bytes of one longest prompt's keys and values, as if every layer kept all of them."""
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_kv_heads(parallel) * model.get_num_layers(parallel)
    token_bytes = int(2 * heads * model.get_head_size() * model.dtype.itemsize)
    return max(LEAST_CACHE_BYTES, token_bytes * (int(model.max_model_len) + 1))


def _digest(config: Any) -> str:
    """Of what Q, K and V depend on beside the weights and the tokens."""
    model, parallel = config.model_config, config.parallel_config
    parts = [
        compat.installed_version(),
        model.hf_config.to_json_string(use_diff=False),
        str(model.dtype),
        model.quantization,
        str(config.cache_config.cache_dtype),
        model.max_model_len,
        parallel.tensor_parallel_size,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def obey(channel: Channel) -> None:
    """Answers requests until the other end is closed."""
    host = Host()
    while True:
        request = channel.receive()
        try:
            answer = {"value": getattr(host, request["method"])(**request["arguments"])}
        except _REFUSALS as error:
            answer = {"refused": str(error)}
        except SystemExit as error:  # admission's one line
            answer = {"refused": str(error.code)}
        except Exception as error:  # whatever vLLM raises; its log has the traceback
            traceback.print_exc()
            answer = {"failed": one_line(error)}
        channel.send(answer)


def main() -> None:
    """Runs the process."""
    os.environ.pop(PROFILE_VARIABLE, None)
    # The engine runs in this process; workers of several ranks are other processes all the same.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        obey(Channel(socket.socket(fileno=int(sys.argv[1]))))
    except ClosedError:
        sys.exit(1)


if __name__ == "__main__":
    main()
