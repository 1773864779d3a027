"""vLLM as the tuner's and the evaluation's engine on CUDA."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models import merged, save_adapter
from tests.quantised_checkpoints import quantise
from tests.tuning_jobs import save_tiny_model
from vllm_afbs import tune
from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.engine.client import VllmEngine
from vllm_afbs.engine.sparse_model import EngineAdapter
from vllm_afbs.evaluate import __main__ as evaluate
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.tuning.capture import capture

pytestmark = pytest.mark.gpu

LENGTH, BLOCK = 2000, 128
WINDOWS = {CALIBRATION: [(7 * i + i // 9) % 256 for i in range(LENGTH)]}
SERVE = ["--max-num-batched-tokens", "1024", "--max-num-seqs", "4", "--max-model-len", "4096"]
SERVE += ["--gpu-memory-utilization", "0.2"]
SMALL = ["--lengths", "1024", "2048", "--tolerance", "0.3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, hidden_size=256, max_position_embeddings=4096)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(folder / "one", seed=1, head_dim=64, logits=256)


@pytest.fixture(scope="module")
def engine(model: Path, adapter: Path) -> Iterator[VllmEngine]:
    """An engine whose base model runs, unless a LoRA adapter is asked for."""
    serve = ["--dtype", "bfloat16", "--enable-lora", "--lora-modules", f"one={adapter}"]
    with VllmEngine([str(model), *SERVE, *serve], with_adapters=True) as running:
        yield running


@pytest.fixture(scope="module")
def captured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    own = open_model(str(model))
    folder = tmp_path_factory.mktemp("transformers")
    return capture(own, TransformersEngine(own), WINDOWS, [0, 1], folder, lambda _: None)


def difference(one: Capture, other: Capture, name: str) -> float:
    """Largest relative L1 of any layer."""
    pairs = [
        [getattr(each.load(layer, CALIBRATION), name).double() for each in (one, other)]
        for layer in one.layers
    ]
    return max(float((a - b).abs().sum() / b.abs().sum()) for a, b in pairs)


def test_captures_are_what_transformers_captures(
    engine: VllmEngine, captured: Capture, tmp_path: Path
) -> None:
    """Both compute in bf16, with kernels of their own."""
    found = capture(engine, engine, WINDOWS, [0, 1], tmp_path, lambda _: None)
    for name in ("query", "key", "value"):
        assert difference(found, captured, name) < 0.05


@pytest.mark.parametrize("with_adapter", [False, True])
def test_candidates_are_measured_as_by_transformers(
    model: Path, engine: VllmEngine, adapter: Path, with_adapter: bool, tmp_path: Path
) -> None:
    """With a LoRA adapter, as if it were part of the weights."""
    source: VllmEngine | EngineAdapter = engine
    if with_adapter:
        model, source = merged(model, adapter, tmp_path / "merged"), engine.adapters[0]
    own = TransformersEngine(open_model(str(model))).sparse_model(BLOCK, BLOCK)
    theirs = source.sparse_model(BLOCK, BLOCK)
    thresholds = {
        layer: HeadThresholds(torch.full((4,), tau), torch.full((4,), -1.0))
        for layer, tau in ((0, 0.5), (1, 0.3))
    }
    for chosen in (thresholds, {1: thresholds[1]}, {}):
        one, other = (each.compare(WINDOWS[CALIBRATION], chosen) for each in (own, theirs))
        assert other.dense_loss == pytest.approx(one.dense_loss, rel=0.01)
        assert other.kl == pytest.approx(one.kl, rel=0.1, abs=0.01)
        assert (other.kl > 0.05) == bool(chosen)
    engine.serve(None)


def test_keys_and_values_are_those_of_an_fp8_cache(
    model: Path, captured: Capture, tmp_path: Path
) -> None:
    serve = [str(model), *SERVE, "--dtype", "bfloat16", "--kv-cache-dtype", "fp8"]
    with VllmEngine(serve) as narrow:
        assert narrow.tuned_on().kv_cache_dtype.startswith("fp8")
        found = capture(narrow, narrow, WINDOWS, [0, 1], tmp_path, lambda _: None)
    for name in ("key", "value"):
        # Of the first layer, which no other's rounding reaches.
        rows, wide = (getattr(each.load(0, CALIBRATION), name) for each in (found, captured))
        torch.testing.assert_close(rows.to(torch.float8_e4m3fn).to(rows.dtype), rows)
        gap = (rows.double() - wide.double()).abs().sum() / wide.double().abs().sum()
        assert 0.005 < float(gap) < 0.05  # three bits of mantissa


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_write_what_one_rank_does(model: Path, captured: Capture, tmp_path: Path) -> None:
    serve = [str(model), *SERVE, "--dtype", "bfloat16", "--tensor-parallel-size", "2"]
    with VllmEngine(serve) as two:
        found = capture(two, two, WINDOWS, [0, 1], tmp_path, lambda _: None)
    for name in ("query", "key", "value"):
        assert difference(found, captured, name) < 0.05


def test_fp8_weights_are_tuned_to_a_goal_and_measured(model: Path, tmp_path: Path) -> None:
    checkpoint, output = tmp_path / "fp8", tmp_path / "profile.json"
    quantise(model, checkpoint, "FP8_DYNAMIC")
    goal = ["--target-sparsity", "0.3"]
    assert tune.main([str(checkpoint), "--output", str(output), *SMALL, *goal, *SERVE]) == 0
    tuned = load_profile(output)
    assert tuned.tuned_on is not None
    assert tuned.tuned_on.quantization == "compressed-tensors"
    given = ["--profile", str(output), "--output", str(tmp_path / "q.json")]
    given += ["--text", str(Path(__file__).parent.parent / "docs/benchmarks.md")]
    given += ["--tests", "perplexity", "prefixes", "--prefixes", "4", "--windows", "2"]
    assert evaluate.main([str(checkpoint), *given, *SERVE]) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert report["through"] == tuned.tuned_on.engine
    assert report["sparsity"] >= 0.0
