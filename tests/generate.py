"""Greedy answers of vLLM in a process of its own: ``python -m tests.generate REQUEST ANSWER``.

REQUEST is a JSON file with ``llm`` (arguments of ``vllm.LLM``), ``prompts`` (lists of token ids)
and ``max_tokens``; ANSWER becomes a list of {"token_ids", "first": {token id: probability}}.
"""

import json
import math
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**request["llm"])
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], logprobs=20)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    answers = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
    Path(sys.argv[2]).write_text(
        json.dumps(
            [
                {
                    "token_ids": list(answer.token_ids),
                    "first": {
                        str(token): math.exp(value.logprob)
                        for token, value in answer.logprobs[0].items()
                    },
                }
                for answer in answers
            ]
        )
    )


if __name__ == "__main__":
    main()
