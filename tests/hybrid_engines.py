"""Hybrid models served in a process of its own: ``python -m tests.hybrid_engines REQUEST ANSWER``.

REQUEST is a JSON file with a list of engines, one after the other in one process, which imports
vLLM once. Each is ``llm`` (arguments of ``vllm.LLM``), ``prompts`` (lists of token ids) and, for
each prompt, ``images`` (the seeds of random ones) and ``adapters`` (the directory of its LoRA
adapter or null). With ``levels``, all prompts are computed once at each of them in turn; null
stands for a level's file that is gone. ANSWER becomes a list of what each engine did; see ``Run``.
"""

import gc
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict
from unittest.mock import patch

from benchmarks.inspection import inspect_models_here
from tests import wrappers
from tests.generate import ask_module
from tests.hybrids import LENGTH


class Run(TypedDict):
    """What one engine did.

    Attributes:
        logprobs: Of each prompt's tokens after the first, in order.
        calls: By attention layer, the classes of metadata that vLLM's own ``forward`` got; a layer
            is missing if it was never called.
        stock_layers: Names of the layers whose ``forward`` is vLLM's own.
        products: By layer index, computed and skipped block products.
        fallbacks: Dense prefills by reason.
        log: What we logged.
    """

    logprobs: list[list[float]]
    calls: dict[str, list[str]]
    stock_layers: list[str]
    products: dict[str, list[int]]
    fallbacks: dict[str, int]
    log: list[str]


def run_engines(engines: list[dict[str, Any]], directory: Path) -> list[Run]:
    """Runs this module in a process of its own.

    Args:
        engines: What REQUEST holds.
        directory: Where REQUEST and ANSWER are written.
    """
    runs: list[Run] = ask_module("tests.hybrid_engines", engines, directory)
    return runs


def engine(
    model: Path,
    backend: dict[str, Any],
    profile: Path | None = None,
    adapters: Sequence[Path | None] = (None, None),
    settings: Mapping[str, Any] | None = None,
    levels: Sequence[str | None] = (),
    **llm: Any,
) -> dict[str, Any]:
    """One engine of REQUEST, for two prompts of ``LENGTH`` tokens.

    Args:
        model: The checkpoint.
        backend: vLLM's ``attention_config``.
        profile: The profile to serve.
        adapters: The LoRA adapter of each prompt.
        settings: Ours, beside the profile.
        levels: At which to compute the prompts, one after the other; none for the one at start.
        llm: Other arguments of ``vllm.LLM``.
    """
    served = {} if profile is None else {"afbs": {"profile": str(profile), **(settings or {})}}
    arguments = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": LENGTH + 8,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "num_gpu_blocks_override": 256,  # vLLM would fill a GiB with zeros
        "enable_prefix_caching": False,
        "attention_config": backend,
        "additional_config": served,
    }
    prompts = [[(7 * row * row + 13 * seed) % 253 + 3 for row in range(LENGTH)] for seed in (1, 2)]
    paths = [None if path is None else str(path) for path in adapters]
    return {
        "llm": arguments | llm,
        "prompts": prompts,
        "images": [[] for _ in prompts],
        "adapters": paths,
        "levels": list(levels),
    }


def main() -> None:
    import logging

    from vllm_afbs.backends.cpu import backend

    inspect_models_here()
    lines: list[str] = []

    def collected(record: logging.LogRecord) -> bool:
        lines.append(f"{record.levelname}: {record.getMessage()}")
        return True

    # vLLM removes handlers when it sets its log up anew, which it does for each engine.
    logging.getLogger("vllm.afbs").addFilter(collected)
    engines = json.loads(Path(sys.argv[1]).read_text())
    runs = []
    # Random weights give flat attention. Without a bound on density, whatever is selected runs.
    with patch.object(backend, "MAX_DENSITY", math.inf):
        for each in engines:
            lines.clear()
            runs.append({**_run(**each), "log": list(lines)})
    Path(sys.argv[2]).write_text(json.dumps(runs))


def _run(
    llm: dict[str, Any],
    prompts: list[list[int]],
    images: list[list[int]],
    adapters: list[str | None],
    levels: list[str | None],
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    calls: dict[str, set[str]] = defaultdict(set)
    stock = CPUAttentionBackendImpl.forward

    def recorded(self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any,
                 attn_metadata: Any, *others: Any, **more: Any) -> Any:  # fmt: skip
        if attn_metadata is not None:
            calls[layer.layer_name].add(type(attn_metadata).__name__)
        return stock(self, layer, query, key, value, kv_cache, attn_metadata, *others, **more)

    gc.freeze()  # vLLM collects garbage eight times an engine, each time among all its own objects
    before = _counted()
    with patch.object(CPUAttentionBackendImpl, "forward", recorded):
        server = LLM(**llm)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        given = [_prompt(*each) for each in zip(prompts, images, strict=True)]
        numbers = {path: number for number, path in enumerate(dict.fromkeys(adapters), 1)}
        requests = [path and LoRARequest(path, numbers[path], path) for path in adapters]
        outputs = []
        for turn in levels or [""]:
            if turn != "":
                _turn_to(turn)
            outputs += server.generate(given, sampling, use_tqdm=False, lora_request=requests)
        stock_layers = [
            name
            for name, layer in _attention_layers(server)
            if layer.impl.forward.__func__ is recorded
        ]
    after = _counted()
    logprobs = [
        [next(iter(chosen.values())).logprob for chosen in output.prompt_logprobs[1:]]
        for output in outputs
    ]
    del server
    cleanup_dist_env_and_memory()
    return {
        "logprobs": logprobs,
        "calls": {name: sorted(kinds) for name, kinds in calls.items()},
        "stock_layers": stock_layers,
        "products": _grown(before[0], after[0]),
        "fallbacks": _grown(before[1], after[1]),
    }


def _turn_to(level: str | None) -> None:
    from vllm_afbs.observability import served_level

    if level is None:
        served_level.level_file().unlink()
    else:
        served_level.set_level(level)


def _prompt(ids: list[int], seeds: list[int]) -> dict[str, Any]:
    if not seeds:
        return {"prompt_token_ids": ids}
    return {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": list(map(wrappers.image, seeds))},
    }


def _attention_layers(server: Any) -> list[tuple[str, Any]]:
    from vllm_afbs import compat

    config = server.llm_engine.vllm_config
    return list(compat.attention_layers(config, None).items())


def _counted() -> tuple[dict[str, list[int]], dict[str, int]]:
    """Block products by layer, and fallbacks by reason, of all engines so far."""
    from vllm_afbs.observability import metric_files, metrics
    from vllm_afbs.observability.status import Counters

    counters = Counters(metric_files.read())
    layers = counters.by(f"{metrics.BLOCK_PRODUCTS.name}_total", "layer")
    products = {}
    for layer in layers:
        counted = counters.products(metrics.BLOCK_PRODUCTS, layer=layer)
        products[layer] = [counted.computed, counted.skipped]
    fallbacks = counters.by(f"{metrics.DENSE_FALLBACKS.name}_total", "reason")
    return products, {reason: round(count) for reason, count in fallbacks.items()}


def _grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    grown = {}
    for name, value in after.items():
        if isinstance(value, list):
            earlier = before.get(name, [0] * len(value))
            grown[name] = [now - then for now, then in zip(value, earlier, strict=True)]
        else:
            grown[name] = value - before.get(name, 0)
    return {name: value for name, value in grown.items() if value and value != [0, 0]}


if __name__ == "__main__":
    main()
