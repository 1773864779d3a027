"""benchmarks/hybrid_gpu.py, apart from what it measures on a GPU."""

import csv
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engine, hybrid_gpu
from benchmarks.engine import Job
from benchmarks.hybrid_models import FULL, MODELS
from vllm_afbs.check.layers import parse_serve_arguments, plan_server, server_config

CONFIGURATIONS = Path(__file__).parents[1] / "docs" / "models"
LENGTHS = (32768, 131072)
DIFFERENT = {
    "gemma-3-27b": set(),
    "gpt-oss-120b": {"num_local_experts"},
    "qwen3.5-27b": {"architectures", "model_type"},
}
"""What a benchmark's model has otherwise than the model that it is named after."""
WRITTEN_OTHERWISE = {"max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta"}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_named_model(name: str) -> None:
    real = json.loads((CONFIGURATIONS / f"{name}.json").read_text(encoding="utf-8"))["config"]
    mine = MODELS[name].config
    common = (mine.keys() & real.keys()) - WRITTEN_OTHERWISE
    assert {field for field in common if mine[field] != real[field]} == DIFFERENT[name]
    assert {"num_attention_heads", "head_dim", "hidden_size", "num_hidden_layers"} <= common


@pytest.mark.parametrize(
    ("name", "divisor", "full", "layers"),
    [
        ("gemma-3-27b", 1, 10, 62), ("gpt-oss-120b", 1, 18, 36), ("qwen3.5-27b", 1, 16, 64),
        ("gemma-3-27b", 2, 5, 31), ("gpt-oss-120b", 2, 9, 18), ("qwen3.5-27b", 4, 4, 16),
    ],
)  # fmt: skip
def test_shallower_models_keep_the_proportion_of_kinds(
    name: str, divisor: int, full: int, layers: int
) -> None:
    model = MODELS[name].shallower(divisor)
    kinds = model.config["layer_types"]
    assert (kinds.count(FULL), len(kinds)) == (full, layers)
    assert model.config["num_hidden_layers"] == layers
    assert f"{full} of {layers} layers full" in model.shape


def test_a_model_without_full_layers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hybrid_gpu.main(["--models", "gemma-3-27b", "--depth-divisor", "11"])
    assert "gemma-3-27b: at most 10 expected" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["4096", "32769", "262144"])
def test_lengths_that_cannot_be_measured_are_refused(
    length: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        hybrid_gpu.main(["--lengths", length])
    assert f"from 8192 to 131072 expected, got {length}" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_all_full_layers_of_the_served_model_are_sparse(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM

    model = MODELS[name]
    job = hybrid_gpu.jobs(model, tmp_path, LENGTHS, 1, 0.2)[hybrid_gpu.SPARSE]
    # Kept for other tests.
    stock = Qwen3NextForCausalLM.set_moe_parameters
    monkeypatch.setattr(Qwen3NextForCausalLM, "set_moe_parameters", stock)
    if job.without_experts:
        engine.allow_no_experts()
    arguments = [job.model, "--attention-backend", "afbs", "--dtype", "bfloat16"]
    arguments += ["--skip-tokenizer-init", "--max-model-len", str(job.max_model_len)]
    arguments += ["--additional-config", json.dumps({"afbs": {"profile": job.profile}})]
    answer = plan_server(server_config(parse_serve_arguments(arguments)))
    assert not answer.notes  # vLLM made the layers
    assert answer.summary.num_sparse == model.num_full
    assert answer.summary.num_others == len(model.kinds) - model.num_full
    assert [len(prompt) for prompt in job.prompts] == list(LENGTHS)


class RMSNorm(torch.nn.Module):
    """Scales by its weight."""

    offset = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(64))

    def scale(self) -> torch.Tensor:
        return self.weight + self.offset


class GemmaRMSNorm(RMSNorm):
    """Scales by 1 + its weight."""

    offset = 1.0


@pytest.mark.parametrize("kind", [RMSNorm, GemmaRMSNorm])
def test_drawn_norms_keep_activations_and_make_scores_flat(kind: type[RMSNorm]) -> None:
    linear = torch.nn.Linear(64, 64)
    model = torch.nn.ModuleDict({"q_norm": kind(), "k_norm": kind(), "input": kind(), "up": linear})
    engine._draw_weights(model)
    scales = {name: norm.scale() for name, norm in model.items() if isinstance(norm, RMSNorm)}
    assert all((scales[name] == 1.0).all() for name in ("k_norm", "input"))
    assert (scales["q_norm"] == engine.FLAT).all()
    assert 0.015 < float(linear.weight.detach().std()) < 0.025
    # Equal tokens, whose normalised queries and keys have a length of 16 in heads of 256.
    assert 16.0 * 16.0 * engine.FLAT / 256**0.5 <= 0.125


def result(seconds: dict[str, list[float]], computed: float = 0, skipped: float = 0) -> Any:
    return {
        "first_token_seconds": seconds,
        "decode_seconds": {},
        "block_products": {"computed": computed, "skipped": skipped},
        "sparse_layers": 10 if skipped else 0,
    }


RESULTS = {
    "FLASH_ATTN": result({"32768": [4.0, 4.0], "131072": [20.0, 20.0]}),
    "FLASH_ATTN, pages of 128": result({"32768": [5.0, 5.0], "131072": [16.0, 16.0]}),
    "afbs": result({"32768": [2.0, 2.0], "131072": [10.0, 10.0]}, 20, 80),
}
LAYER_SECONDS = {
    32768: {"dense": [0.02], "sparse": [0.01]},
    131072: {"dense": [0.32], "sparse": [0.08]},
}


def test_rows_compare_with_the_faster_baseline_of_each_length() -> None:
    model = MODELS["gemma-3-27b"]
    rows = hybrid_gpu.model_rows(model, RESULTS, LAYER_SECONDS)
    found = {(row.what, row.shape.removeprefix(f"{model.shape}, ")): row.p50 for row in rows}
    speedup = "afbs: time to first token, speedup over the faster FLASH_ATTN"
    share = "all full layers, dense: share of the faster FLASH_ATTN's time"
    follows = "all full layers, sparse: speedup over the faster FLASH_ATTN that follows"
    assert found[speedup, "32768"] == 2.0
    assert found[speedup, "131072"] == 1.6
    assert found["afbs: density of long prefills", "all"] == 0.2
    assert found["afbs: sparse layers", "all"] == 10
    assert found[share, "32768"] == pytest.approx(10 * 0.02 / 4.0)
    assert found[share, "131072"] == pytest.approx(10 * 0.32 / 16.0)
    assert found[follows, "32768"] == pytest.approx(4.0 / (4.0 - 10 * 0.01), abs=1e-6)
    assert found[follows, "131072"] == pytest.approx(16.0 / (16.0 - 10 * 0.24), abs=1e-6)


def layer_timed(*_: object) -> hybrid_gpu.LayerSeconds:
    return LAYER_SECONDS


def layer_failed(*_: object) -> None:
    raise ValueError("no kernel for these heads")


@pytest.mark.parametrize("failing", ["afbs", "FLASH_ATTN", "single layer"])
def test_a_failure_is_told_and_loses_no_other_row(
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_job(job: Job) -> Any:
        if job.name == failing:
            raise RuntimeError(f"{job.name}: CUDA out of memory")
        return RESULTS[job.name]

    monkeypatch.setattr(hybrid_gpu, "run_job", run_job)
    timed = layer_failed if failing == "single layer" else layer_timed
    monkeypatch.setattr(hybrid_gpu, "time_layer", timed)
    output = tmp_path / "rows.csv"
    names = ["gemma-3-27b", "gpt-oss-120b"]
    with pytest.raises(SystemExit) as ended:
        hybrid_gpu.main(["--models", *names, "--output", str(output)])
    why = "no kernel for these heads" if failing == "single layer" else "CUDA out of memory"
    assert failing in str(ended.value)
    assert why in str(ended.value)
    assert why in capsys.readouterr().err
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in names:
        kept = {row["what"] for row in rows if row["shape"].startswith(name)}
        for engine_name in set(RESULTS) - {failing}:
            assert f"{engine_name}: time to first token" in kept
        assert f"{failing}: time to first token" not in kept
        assert ("one full layer: dense attention" in kept) == (failing != "single layer")


def test_nothing_fails_where_every_engine_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid_gpu, "run_job", lambda job: RESULTS[job.name])
    monkeypatch.setattr(hybrid_gpu, "time_layer", layer_timed)
    options = {"output": None, "lengths": LENGTHS, "rounds": 1, "layer_rounds": 1, "density": 0.2}
    args = Namespace(**options, engines=["afbs"])
    assert hybrid_gpu.run(args, [MODELS["gemma-3-27b"]]) == []
