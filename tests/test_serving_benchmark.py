"""benchmarks/serving_gpu.py, apart from what it measures on a GPU."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving_gpu
from benchmarks.engine import Job
from benchmarks.serving_gpu import BASELINES, DECODES, jobs
from vllm_afbs.profile.file import load_profile


def test_engines_differ_in_nothing_but_attention(tmp_path: Path) -> None:
    engines = jobs(tmp_path, [4096, 131072], 3, [0.2], "fp8")
    assert {engine.kv_cache_dtype for engine in engines} == {"fp8"}
    assert len({engine.max_model_len for engine in engines}) == 1
    *baselines, sparse, unused = engines
    assert [engine.name for engine in baselines] == list(BASELINES)
    for engine in (*baselines, sparse):
        assert [len(prompt) for prompt in engine.prompts] == [4096, 131072]
        assert engine.prompts == sparse.prompts
        assert engine.decodes == list(DECODES)
    assert sparse.profile is not None
    assert load_profile(Path(sparse.profile)).max_seq_len == 131072
    assert [len(prompt) for prompt in unused.prompts] == [4096]


def test_engines_without_work_are_left_out(tmp_path: Path) -> None:
    names = [engine.name for engine in jobs(tmp_path, [131072], 3, [0.2], decodes=())]
    assert names == [*BASELINES, "afbs tau=0.2"]


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_rows_name_a_cache_that_is_not_the_models_own(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(job: Job) -> dict[str, Any]:
        return {
            "first_token_seconds": {"131072": [1.0 if job.backend == "AFBS" else 2.0]},
            "decode_seconds": {},
            "block_products": {"computed": 0, "skipped": 0},
            "sparse_layers": 0,
        }

    written: list[Any] = []
    monkeypatch.setattr(serving_gpu, "run_job", run_job)
    monkeypatch.setattr(serving_gpu, "report_rows", lambda rows, _: written.append(rows))
    given = ["--lengths", "131072", "--prefill-only", "--kv-cache-dtype", dtype]
    monkeypatch.setattr(sys, "argv", ["serving_gpu", *given])
    serving_gpu.main()
    shape = "131072" if dtype == "auto" else "131072, fp8 KV cache"
    found = {row.what: row.p50 for row in written[-1] if row.shape == shape}
    assert len(found) == len(written[-1]) == 4
    assert found["afbs tau=0.2: time to first token, speedup over the faster FLASH_ATTN"] == 2.0
