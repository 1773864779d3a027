"""Tokens that vLLM computes again after it preempted a request are a prefill like any other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.generate import generate
from tests.models import save_small_model
from tests.profiles import SMALL_MODEL, uniform_profile
from tests.written_metrics import counters_in
from vllm_afbs.backends.shared import StepSorter
from vllm_afbs.files import write_atomically
from vllm_afbs.observability import instance
from vllm_afbs.profile.fingerprint import ModelFingerprint

PROMPT_LEN, ANSWER_LEN, MIN_SEQ_LEN, BLOCK = 300, 300, 320, 32


def test_generated_tokens_count_as_a_prompts_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A decode is one row; after a preemption the same request comes with all its tokens."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    config: Any = SimpleNamespace(speculative_config=None, lora_config=None, additional_config={})
    sorter = StepSorter(config, uniform_profile(min_seq_len=1024))

    def sort(q_len: int, kv_len: int) -> Any:
        common: Any = SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, q_len]), max_query_len=q_len
        )
        return sorter.sort(common, torch.tensor([kv_len]), plain_causal=True)

    assert sort(1000, 1000).dense_reasons == {"short_context": 1}  # the prompt
    decode = sort(1, 1499)
    assert not decode.has_prefill
    (again,) = sort(1500, 1500).long_prefills
    assert (again.geometry.q_len, again.geometry.kv_len) == (1500, 1500)
    # With prefix caching, what is still in the cache is not computed again.
    (rest,) = sort(200, 1500).long_prefills
    assert (rest.geometry.q_len, rest.geometry.kv_len) == (200, 1500)


def test_a_preempted_request_is_computed_again_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompts are too short to run sparse, so whatever runs sparse is computed again."""
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(tmp_path / "metrics"))
    model = save_small_model(tmp_path / "model")
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model))
    profile = uniform_profile(
        fingerprint, 0.5, min_seq_len=MIN_SEQ_LEN, block_q=BLOCK, block_k=BLOCK
    )
    path = tmp_path / "profile.json"
    write_atomically(path, profile.to_json())
    engine = {
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 640,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 2,
        "enforce_eager": True,
        "block_size": BLOCK,
        # Two requests of 600 tokens need 38 pages. Both fit until they have 432 tokens each.
        "num_gpu_blocks_override": 28,
        "enable_prefix_caching": False,
        "attention_config": {"backend": "AFBS"},
        "additional_config": {"afbs": {"profile": str(path)}},
    }
    prompts = [[(seed * n) % 250 for n in range(PROMPT_LEN)] for seed in (7, 11)]
    batch = {"prompts": prompts, "max_tokens": ANSWER_LEN, "ignore_eos": True}
    ((answers,),) = generate([{"llm": engine, "batches": [batch]}], tmp_path)
    assert [len(each["token_ids"]) for each in answers] == [ANSWER_LEN] * 2

    counters = counters_in(tmp_path / "metrics")
    num_layers = SMALL_MODEL.num_layers
    tokens = counters.by("vllm_afbs_prefill_tokens_total", "path")
    reasons = counters.by("vllm_afbs_dense_fallbacks_total", "reason")
    assert tokens["dense"] == num_layers * 2 * PROMPT_LEN
    assert reasons == {"short_context": num_layers * 2}
    again, remainder = divmod(tokens["sparse"], num_layers)
    # One request, once: its prompt and what it had generated when the cache was full.
    assert remainder == 0
    assert MIN_SEQ_LEN < again < PROMPT_LEN + ANSWER_LEN
    assert counters.by("vllm_afbs_block_products_total", "outcome")["skipped"] > 0
