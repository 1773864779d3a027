"""Greedy answers of vLLM in a process of its own: ``python -m tests.generate REQUEST ANSWER``.

REQUEST is a JSON file with ``llm`` (arguments of ``vllm.LLM``) and ``batches``, each of them
``prompts`` (lists of token ids), ``max_tokens`` and, to keep the batch's keys and values apart in
the prefix cache, ``cache_salt``; ANSWER becomes, for each batch, a list of {"token_ids",
"num_cached_tokens", "first": {token id: probability}}.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**request["llm"])
    answers = []
    for batch in request["batches"]:
        sampling = SamplingParams(temperature=0, max_tokens=batch["max_tokens"], logprobs=20)
        salt = {"cache_salt": batch["cache_salt"]} if "cache_salt" in batch else {}
        prompts = [{"prompt_token_ids": ids, **salt} for ids in batch["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answers.append([_answer(output) for output in outputs])
    Path(sys.argv[2]).write_text(json.dumps(answers))


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
