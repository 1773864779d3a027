"""The backend in a real engine on a GPU beside FLASH_ATTN, on a small model of random weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Decode, Job, run_job
from benchmarks.profiles import uniform_profile
from benchmarks.serving_gpu import LLAMA_8B
from vllm_afbs.evaluate.divergence import total_variation
from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.observability import instance, metric_files
from vllm_afbs.observability.status import Counters
from vllm_afbs.profile.fingerprint import ModelFingerprint

NUM_LAYERS, NUM_HEADS = 2, 8
PROMPT_LENS = (20000, 300, 9000, 40)
CHUNKS = ((16384, 16384), (3616, 20000), (9000, 9000))
"""Query rows and context of the long prompts' prefills when each is alone."""


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    changes = {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS}
    changes |= {"num_key_value_heads": 2, "hidden_size": 1024, "intermediate_size": 2048}
    changes |= {"vocab_size": 1024}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | changes), encoding="utf-8")
    return tmp_path


@pytest.mark.gpu
def test_engine_answers_as_flash_attention_does(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    # Read once the engine has gone.
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(model_dir / "metrics"))
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model_dir))
    # Calibrated as sparse, so that it runs sparse, but with a tau that keeps nearly every block.
    nearly_all = uniform_profile(fingerprint, 1 - 1e-6, 0.8, [8192, 32768])
    path = model_dir / "profile.json"
    write_atomically(path, nearly_all.to_json())
    prompts = [[(11 * i + n) % 1000 for i in range(n)] for n in PROMPT_LENS]

    def answers(backend: str, profile: str | None) -> dict[str, Any]:
        return run_job(
            Job(
                backend, backend, str(model_dir), True, 32768, prompts, 1,
                decodes=[Decode(2, 200, 17)], profile=profile, num_answer_tokens=8,
                way=None if profile is None else "tiles",
                settings={"per_head_metrics": True, "sample_rate": 1.0} if profile else {},
            )
        )  # fmt: skip

    stock, sparse = answers("FLASH_ATTN", None), answers("AFBS", str(path))
    assert stock["block_products"] == {"computed": 0, "skipped": 0}
    for mine, theirs in zip(sparse["answers"], stock["answers"], strict=True):
        assert total_variation(mine["next_token"], theirs["next_token"]) < 0.01
    # Each long prompt is prefilled twice alone (once to warm up) before the products are read.
    visible = sum(BlockGeometry(q, kv, 128, 128).num_visible for q, kv in CHUNKS)
    products = sparse["block_products"]
    total = products["computed"] + products["skipped"]
    assert total == 2 * NUM_LAYERS * NUM_HEADS * visible * 2
    assert products["computed"] > 0.99 * total

    counters = Counters(metric_files.read())
    for outcome in ("computed", "skipped"):
        by_head = counters.by("vllm_afbs_head_block_products_total", "outcome")[outcome]
        assert by_head == counters.by("vllm_afbs_block_products_total", "outcome")[outcome]
    heads = counters.by("vllm_afbs_head_block_products_total", "head")
    assert set(heads) == {str(head) for head in range(NUM_HEADS)}
    num_sparse = counters.by("vllm_afbs_prefill_attention_seconds_count", "path")["sparse"]
    num_samples = sum(counters.by("vllm_afbs_sampled_error_count", "layer").values())
    assert num_samples == num_sparse > 0
    # Nearly every block is kept, so what differs is bf16's rounding.
    assert sum(counters.by("vllm_afbs_sampled_error_sum", "layer").values()) < 0.02 * num_samples
    tokens = counters.by("vllm_afbs_prefill_tokens_total", "path")
    assert tokens["sparse"] >= 2 * NUM_LAYERS * sum(q_len for q_len, _ in CHUNKS)
    assert tokens["dense"] >= NUM_LAYERS * 300
    assert counters.value("vllm_afbs_dense_estimate_seconds_total") > 0


@pytest.mark.gpu
def test_speculative_decoding_verifies_as_flash_attention_does(model_dir: Path) -> None:
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model_dir))
    path = model_dir / "profile.json"
    write_atomically(path, uniform_profile(fingerprint, 0.5, 0.5, [8192, 32768]).to_json())
    # They repeat themselves, so that drafts are found, and are too short to run sparse.
    prompts = [[(n + i % 17) % 1000 for i in range(n)] for n in (600, 300, 40)]

    def answers(backend: str, profile: str | None) -> list[list[int]]:
        drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
        result = run_job(
            Job(
                backend, backend, str(model_dir), True, 32768, prompts, 1, profile=profile,
                num_answer_tokens=32, speculative=drafts,
            )
        )  # fmt: skip
        return [each["token_ids"] for each in result["answers"]]

    assert answers("AFBS", str(path)) == answers("FLASH_ATTN", None)
