"""The served model's answers against stock vLLM's, on a real model and real text."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.profiles import uniform_profile
from vllm_afbs.demo.assets import prepare
from vllm_afbs.demo.server import SERVER_ENVIRONMENT
from vllm_afbs.profile import ModelFingerprint
from vllm_afbs.profile_file import write_atomically

pytestmark = pytest.mark.machine

Answers = list[dict[str, Any]]
Generate = Callable[..., list[Answers]]
NUM_PROMPTS, PROMPT_TOKENS, LONG_TOKENS, CHUNK = 20, 320, 2048, 512
MIN_SEQ_LEN = 256  # so that the short prompts run through tiles, too


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    """Short prompts with several tokens of an answer, and a long one with its first."""
    assets = prepare()
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir)
    ids: list[int] = tokenizer(assets.prompt_file.read_text(), verbose=False).input_ids
    short = [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(NUM_PROMPTS)]
    return [
        {"prompts": short, "max_tokens": 8},
        {"prompts": [ids[:LONG_TOKENS]], "max_tokens": 1},
    ]


@pytest.fixture(scope="module")
def generate(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Generate:
    model = ModelFingerprint.from_config(AutoConfig.from_pretrained(smollm2_dir))

    def run(batches: list[dict[str, Any]], tau: float | None = None) -> list[Answers]:
        directory = tmp_path_factory.mktemp("generate")
        llm: dict[str, Any] = {
            "model": str(smollm2_dir),
            # bf16 products are emulated, several times slower, on CPUs without AVX-512.
            "dtype": "float32",
            "max_model_len": 8192,
            # No more than the long prompt: engines warm up with as many tokens.
            "max_num_batched_tokens": LONG_TOKENS,
            "enforce_eager": True,
            "attention_config": {"backend": "CPU_ATTN" if tau is None else "AFBS"},
        }
        if tau is not None:
            profile = directory / "profile.json"
            tuned = uniform_profile(model, tau, min_seq_len=MIN_SEQ_LEN)
            write_atomically(profile, tuned.to_json())
            llm["additional_config"] = {"afbs": {"profile": str(profile)}}
        request, answer = directory / "request.json", directory / "answer.json"
        request.write_text(json.dumps({"llm": llm, "batches": batches}))
        done = subprocess.run(
            [sys.executable, "-m", "tests.generate", str(request), str(answer)],
            cwd=Path(__file__).parent.parent,
            # Without an engine process, which would import vLLM once more.
            env=os.environ | SERVER_ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers: list[Answers] = json.loads(answer.read_text())
        return answers

    return run


@pytest.fixture(scope="module")
def stock(generate: Generate, batches: list[dict[str, Any]]) -> list[Answers]:
    return generate(batches)


def total_variation(one: dict[str, float], other: dict[str, float]) -> float:
    return 0.5 * sum(abs(one.get(k, 0.0) - other.get(k, 0.0)) for k in one.keys() | other.keys())


def test_tau_1_answers_as_stock_vllm_token_for_token(
    generate: Generate, batches: list[dict[str, Any]], stock: list[Answers]
) -> None:
    (ours,) = generate(batches[:1], tau=1.0)
    assert [a["token_ids"] for a in ours] == [a["token_ids"] for a in stock[0]]


def test_chunking_moves_the_answer_less_than_sparsity_does(
    generate: Generate, batches: list[dict[str, Any]], stock: list[Answers]
) -> None:
    """Chunks of 512 cut between query blocks, so the same blocks are selected for the same rows.

    Prompts that grow by a chunk find what is before it in the prefix cache, so one engine computes
    the prompt whole and in chunks. What remains is rounding and the few blocks whose mass it
    carries over tau. So the next-token distribution may move by no more than dropping blocks itself
    moves it.
    """
    (dense,) = stock[1]
    (long,) = batches[1:]
    (ids,) = long["prompts"]
    ends = range(CHUNK, LONG_TOKENS + 1, CHUNK)
    growing = [long | {"prompts": [ids[:end]]} for end in ends]
    (whole,), *chunks = generate([long | {"cache_salt": "whole"}, *growing], tau=0.9)
    assert whole["num_cached_tokens"] == 0
    assert [chunk["num_cached_tokens"] for (chunk,) in chunks] == [end - CHUNK for end in ends]
    (chunked,) = chunks[-1]
    by_sparsity = total_variation(whole["first"], dense["first"])
    by_chunking = total_variation(whole["first"], chunked["first"])
    assert by_sparsity > 0, "nothing ran sparse"
    assert by_chunking <= by_sparsity
