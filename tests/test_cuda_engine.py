"""The backend in a real engine on a GPU beside FLASH_ATTN, on a small model of random weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import Decode, Job, run_job
from benchmarks.profiles import uniform_profile
from benchmarks.serving_gpu import LLAMA_8B
from tests.generate import generate
from tests.written_metrics import counters_in
from vllm_afbs.evaluate.divergence import total_variation
from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.observability import instance
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
@pytest.mark.parametrize("block_k", [128, 64])
def test_engine_answers_as_flash_attention_does(
    block_k: int, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tiles, which need pages of the profile's key blocks."""
    from transformers import AutoConfig

    # Read once the engine has gone.
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(model_dir / "metrics"))
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model_dir))
    # Calibrated as sparse, so that it runs sparse, but with a tau that keeps nearly every block.
    nearly_all = uniform_profile(fingerprint, 1 - 1e-6, 0.8, [8192, 32768], block_k=block_k)
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
    visible = sum(BlockGeometry(q, kv, 128, block_k).num_visible for q, kv in CHUNKS)
    products = sparse["block_products"]
    total = products["computed"] + products["skipped"]
    assert total == 2 * NUM_LAYERS * NUM_HEADS * visible * 2
    assert products["computed"] > 0.99 * total

    counters = counters_in(model_dir / "metrics")
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


def make_engine(directory: Path, changes: dict[str, Any], max_seq_len: int) -> dict[str, Any]:
    """A server of a random model that differs from Llama 3 8B as told, every layer sparse."""
    from transformers import AutoConfig

    (directory / "config.json").write_text(json.dumps(LLAMA_8B | changes), encoding="utf-8")
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(directory))
    profile = uniform_profile(fingerprint, 0.9, 0.9, [1024, max_seq_len])
    write_atomically(directory / "profile.json", profile.to_json())
    return {
        "model": str(directory),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_num_seqs": 2,
        "enable_prefix_caching": False,
        "attention_config": {"backend": "AFBS"},
        "additional_config": {"afbs": {"profile": str(directory / "profile.json")}},
    }


@pytest.mark.gpu
def test_a_full_graph_server_counts_every_prefilled_token(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk of the prompt fits into a captured size, which would replay it dense."""
    monkeypatch.setenv(instance.DIRECTORY_VARIABLE, str(model_dir / "metrics"))
    changes = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    num_tokens, chunk = 9000, 512
    engine = make_engine(model_dir, changes, 16384) | {
        "max_model_len": 16384,
        "max_num_batched_tokens": chunk,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL",
            "cudagraph_capture_sizes": [1, 2, 64, 128, 256, chunk],
        },
    }
    prompt = [(11 * i) % 1000 for i in range(num_tokens)]
    batch = {"prompts": [prompt], "max_tokens": 8, "ignore_eos": True}
    generate([{"llm": engine, "batches": [batch]}], model_dir)
    counters = counters_in(model_dir / "metrics")
    tokens = counters.by("vllm_afbs_prefill_tokens_total", "path")
    # vLLM may warm up with a few more.
    assert NUM_LAYERS * num_tokens <= sum(tokens.values()) < 1.5 * NUM_LAYERS * num_tokens
    runs = counters_in(model_dir / "metrics").by(
        "vllm_afbs_prefill_attention_seconds_count", "path"
    )
    assert sum(runs.values()) > 0


@pytest.mark.gpu
def test_long_prompts_fit_beside_a_cache_that_fills_the_gpu(tmp_path: Path) -> None:
    """A step of the whole prompt: attention's workspace is larger than all other activations."""
    num_tokens = 131072
    changes = {"num_hidden_layers": 2, "num_attention_heads": 64, "hidden_size": 1024}
    changes |= {"intermediate_size": 1024, "vocab_size": 1024}
    engine = make_engine(tmp_path, changes, num_tokens) | {
        "max_model_len": num_tokens + 16,
        "max_num_batched_tokens": num_tokens,
        "gpu_memory_utilization": 0.98,
        "enforce_eager": True,
    }
    prompt = [(11 * i) % 1000 for i in range(num_tokens)]
    batch = {"prompts": [prompt], "max_tokens": 2, "ignore_eos": True}
    (((answer,),),) = generate([{"llm": engine, "batches": [batch]}], tmp_path)
    assert len(answer["token_ids"]) == 2
