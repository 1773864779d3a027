"""Greedy answers of vLLM in a process of its own: ``python -m tests.generate REQUEST ANSWER``.

REQUEST is a JSON file with a list of engines, one after the other in one process, which imports
vLLM once. Each has ``llm`` (arguments of ``vllm.LLM``) and ``batches``, each of them ``prompts``
(lists of token ids), ``max_tokens`` and, to keep the batch's keys and values apart in the prefix
cache, ``cache_salt``; with ``ignore_eos`` every answer has ``max_tokens`` tokens. ANSWER becomes,
for each engine and batch, a list of {"token_ids", "num_cached_tokens", "first": {token id:
probability}}.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    engines = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([_answers(**engine) for engine in engines]))


def _answers(llm: dict[str, Any], batches: list[dict[str, Any]]) -> list[Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(**llm)
    answers = []
    for batch in batches:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=batch["max_tokens"],
            ignore_eos=batch.get("ignore_eos", False),
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
