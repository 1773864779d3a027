"""Greedy answers of vLLM in a process of its own: ``python -m tests.generate REQUEST ANSWER``.

REQUEST is a JSON file with a list of engines, one after the other in one process, which imports
vLLM once. Each has ``llm`` (arguments of ``vllm.LLM``) and ``batches``, each of them ``prompts``
(lists of token ids), ``max_tokens`` and, to keep the batch's keys and values apart in the prefix
cache, ``cache_salt``; with ``ignore_eos`` every answer has ``max_tokens`` tokens. ANSWER becomes,
for each engine and batch, a list of {"token_ids", "num_cached_tokens", "first": {token id:
probability}}.
"""

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.inspection import inspect_models_here
from vllm_afbs.demo.server import SERVER_ENVIRONMENT

Answers = list[dict[str, Any]]


def generate(engines: list[dict[str, Any]], directory: Path) -> list[list[Answers]]:
    """Runs this module in a process of its own; the answers of each engine and batch.

    Args:
        engines: What REQUEST holds.
        directory: Where REQUEST and ANSWER are written.
    """
    answers: list[list[Answers]] = ask_module("tests.generate", engines, directory)
    return answers


def ask_module(module: str, engines: list[dict[str, Any]], directory: Path) -> Any:
    """Runs ``python -m MODULE REQUEST ANSWER`` with vLLM's settings for a small model; the answer.

    Args:
        module: The module.
        engines: What REQUEST holds.
        directory: Where REQUEST and ANSWER are written.
    """
    request, answer = directory / "request.json", directory / "answer.json"
    request.write_text(json.dumps(engines))
    done = subprocess.run(
        [sys.executable, "-m", module, str(request), str(answer)],
        cwd=Path(__file__).parent.parent,
        # Without engine processes, each of which would import vLLM once more.
        env=os.environ | SERVER_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return json.loads(answer.read_text())


def main() -> None:
    inspect_models_here()
    engines = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([_answers(**engine) for engine in engines]))


def _answers(llm: dict[str, Any], batches: list[dict[str, Any]]) -> list[Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.freeze()  # vLLM collects garbage eight times an engine, each time among all its own objects
    engine = LLM(**llm)
    answers = []
    for batch in batches:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=batch["max_tokens"],
            ignore_eos=batch.get("ignore_eos", False),
            detokenize=not llm.get("skip_tokenizer_init", False),
            logprobs=20,
        )
        salt = {"cache_salt": batch["cache_salt"]} if "cache_salt" in batch else {}
        prompts = [{"prompt_token_ids": ids, **salt} for ids in batch["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        answers.append([_answer(output) for output in outputs])
    del engine
    cleanup_dist_env_and_memory()
    return answers


def _answer(output: Any) -> dict[str, Any]:
    answer = output.outputs[0]
    first = {str(token): math.exp(value.logprob) for token, value in answer.logprobs[0].items()}
    return {
        "token_ids": list(answer.token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "first": first,
    }


if __name__ == "__main__":
    main()
