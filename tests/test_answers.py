"""The served model's answers against stock vLLM's, on a real model and real text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.generate import Answers, generate
from tests.profiles import uniform_profile
from vllm_afbs.demo.assets import prepare
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint

pytestmark = pytest.mark.machine

NUM_PROMPTS, PROMPT_TOKENS, LONG_TOKENS, CHUNK = 20, 320, 2048, 512
CHUNK_ENDS = range(CHUNK, LONG_TOKENS + 1, CHUNK)
MIN_SEQ_LEN = 256  # so that the short prompts run through tiles, too


@dataclass(frozen=True)
class Batches:
    """What the three engines answered: stock vLLM, all blocks kept, and most of the mass kept."""

    stock: list[Answers]
    tau_1: list[Answers]
    sparse: list[Answers]


@pytest.fixture(scope="module")
def answers(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Short prompts with several tokens of an answer, and a long one with its first.

    The long one is computed whole and in chunks by one engine: prompts that grow by a chunk find
    what is before it in the prefix cache.
    """
    directory = tmp_path_factory.mktemp("generate")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids: list[int] = tokenizer(prepare().prompt_file.read_text(), verbose=False).input_ids
    starts = range(0, NUM_PROMPTS * PROMPT_TOKENS, PROMPT_TOKENS)
    short = {"prompts": [ids[start : start + PROMPT_TOKENS] for start in starts], "max_tokens": 8}
    long = {"prompts": [ids[:LONG_TOKENS]], "max_tokens": 1}
    growing = [long | {"prompts": [ids[:end]]} for end in CHUNK_ENDS]
    stock = {
        "model": str(smollm2_dir),
        # bf16 products are emulated, several times slower, on CPUs without AVX-512.
        "dtype": "float32",
        "max_model_len": 8192,
        # No more than the long prompt: engines warm up with as many tokens.
        "max_num_batched_tokens": LONG_TOKENS,
        "enforce_eager": True,
        "attention_config": {"backend": "CPU_ATTN"},
    }

    def ours(tau: float) -> dict[str, Any]:
        model = ModelFingerprint.from_config(AutoConfig.from_pretrained(smollm2_dir))
        profile = directory / f"{tau}.json"
        write_atomically(profile, uniform_profile(model, tau, min_seq_len=MIN_SEQ_LEN).to_json())
        return stock | {
            "attention_config": {"backend": "AFBS"},
            "additional_config": {"afbs": {"profile": str(profile)}},
        }

    engines = [
        {"llm": stock, "batches": [short, long]},
        {"llm": ours(1.0), "batches": [short]},
        {"llm": ours(0.9), "batches": [long | {"cache_salt": "whole"}, *growing]},
    ]
    return Batches(*generate(engines, directory))


def total_variation(one: dict[str, float], other: dict[str, float]) -> float:
    return 0.5 * sum(abs(one.get(k, 0.0) - other.get(k, 0.0)) for k in one.keys() | other.keys())


def test_tau_1_answers_as_stock_vllm_token_for_token(answers: Batches) -> None:
    (ours,) = answers.tau_1
    assert [a["token_ids"] for a in ours] == [a["token_ids"] for a in answers.stock[0]]


def test_chunking_moves_the_answer_less_than_sparsity_does(answers: Batches) -> None:
    """Chunks of 512 cut between query blocks, so the same blocks are selected for the same rows.

    What remains is rounding and the few blocks whose mass it carries over tau. So the next-token
    distribution may move by no more than dropping blocks itself moves it.
    """
    (dense,) = answers.stock[1]
    (whole,), *chunks = answers.sparse
    assert whole["num_cached_tokens"] == 0
    assert [chunk["num_cached_tokens"] for (chunk,) in chunks] == [
        end - CHUNK for end in CHUNK_ENDS
    ]
    (chunked,) = chunks[-1]
    by_sparsity = total_variation(whole["first"], dense["first"])
    by_chunking = total_variation(whole["first"], chunked["first"])
    assert by_sparsity > 0, "nothing ran sparse"
    assert by_chunking <= by_sparsity
