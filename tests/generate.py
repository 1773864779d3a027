"""Greedy answers of vLLM in a process of its own: ``python -m tests.generate REQUEST ANSWER``.

REQUEST is a JSON file with ``llm`` (arguments of ``vllm.LLM``) and ``batches``, each of them
``prompts`` (lists of token ids) and ``max_tokens``; ANSWER becomes, for each batch, a list of
{"token_ids", "first": {token id: probability}}.
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
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        answers.append([_answer(output.outputs[0]) for output in outputs])
    Path(sys.argv[2]).write_text(json.dumps(answers))


def _answer(output: Any) -> dict[str, Any]:
    first = {str(token): math.exp(value.logprob) for token, value in output.logprobs[0].items()}
    return {"token_ids": list(output.token_ids), "first": first}


if __name__ == "__main__":
    main()
