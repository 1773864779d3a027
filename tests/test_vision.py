"""A vision wrapper on the CPU whose images are causal: checked, served, tuned and evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests import wrappers
from tests.hybrid_engines import Run, engine, run_engines
from tests.hybrids import LENGTH
from tests.profiles import one_level, uniform_profile
from tests.tuning_jobs import LENGTHS, where
from vllm_afbs import tune
from vllm_afbs.check.__main__ import EXIT_ON
from vllm_afbs.check.__main__ import main as check
from vllm_afbs.demo.server import SERVER_ENVIRONMENT
from vllm_afbs.errors import InputError
from vllm_afbs.evaluate.__main__ import main as evaluate
from vllm_afbs.files import write_atomically
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.fingerprint import ModelFingerprint

KEEP_ALL, CHOOSE = 1.0, -1.0
"""A theta above every block's self-similarity, and one below."""
NUM_BLOCKS = LENGTH // 128
PRODUCTS = 2 * 4 * NUM_BLOCKS * (NUM_BLOCKS + 1)  # 2 prompts, 4 heads; QK^T and PV of each block


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrappers.save(tmp_path_factory.mktemp("wrapper") / "model")


def save_profile(model: Path, theta: float, path: Path) -> Path:
    """A profile whose heads keep half of the mass at least."""
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model))
    assert fingerprint.num_layers == wrappers.NUM_LAYERS
    profile = uniform_profile(fingerprint, tau=0.5, min_seq_len=256)
    layers = [
        one_level([head.model_copy(update={"theta": theta}) for head in layer.levels[0].heads])
        for layer in profile.layers
    ]
    write_atomically(path, profile.model_copy(update={"layers": layers}).to_json())
    return path


def wrapper_engine(model: Path, backend: str, profile: Path | None = None) -> dict[str, Any]:
    """An engine for a prompt of text and one that consists of images for the most part."""
    made = engine(model, {"backend": backend}, profile, skip_tokenizer_init=False)
    text, mixed = made["prompts"]
    images = [1, 2, 3]
    kept = LENGTH - len(images) * (wrappers.IMAGE_TOKENS + wrappers.FRAME_TOKENS)
    mixed = [mixed[0], *[wrappers.IMAGE_TOKEN] * len(images), *mixed[1:kept]]
    return made | {"prompts": [text, mixed], "images": [[], images]}


def difference(one: Run, other: Run, prompt: int) -> float:
    """The largest of a prompt's log probabilities."""
    pairs = zip(one["logprobs"][prompt], other["logprobs"][prompt], strict=True)
    return max(abs(mine - theirs) for mine, theirs in pairs)


def test_text_and_images_run_sparse_in_every_layer(model: Path, tmp_path: Path) -> None:
    kept, chosen = (
        save_profile(model, theta, tmp_path / f"{theta}.json") for theta in (KEEP_ALL, CHOOSE)
    )
    stock, kept_run, sparse = run_engines(
        [
            wrapper_engine(model, "CPU_ATTN"),
            wrapper_engine(model, "AFBS", kept),
            wrapper_engine(model, "AFBS", chosen),
        ],
        tmp_path,
    )
    for run in (stock, kept_run, sparse):
        assert [len(each) for each in run["logprobs"]] == [LENGTH - 1] * 2
    for prompt in range(2):  # each skips something
        assert difference(kept_run, stock, prompt) <= 1e-5
        assert difference(sparse, stock, prompt) > 1e-4
    for run, skips in ((kept_run, False), (sparse, True)):
        assert sorted(run["products"]) == ["0", "1"]
        for computed, skipped in run["products"].values():
            assert computed + skipped == PRODUCTS
            assert (skipped > 0) == skips
        assert not run["fallbacks"]
        assert not run["stock_layers"]
    assert any("2 of 2 layers sparse" in line for line in sparse["log"])


def test_check_lists_the_layers_of_the_text_part(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = save_profile(model, CHOOSE, tmp_path / "profile.json")
    arguments = ["--model", str(model), "--profile", str(profile), "--dtype", "float32"]
    assert check([*arguments, "--attention-backend", "afbs"]) == EXIT_ON
    printed = capsys.readouterr().out
    assert "layers 0-1: sparse" in printed
    assert "on: 2 of 2 layers sparse" in printed


def test_transformers_refuses_it_and_names_the_other_engine(model: Path) -> None:
    with pytest.raises(InputError, match=r"got Idefics3ForCond.*: take --engine vllm$") as refused:
        open_model(str(model))
    assert "\n" not in str(refused.value)


def test_vllm_tunes_and_evaluates_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SERVER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "profile.json"
    job = [each for each in where(model, output) if each not in ("--engine", "transformers")]
    job += ["--lengths", *LENGTHS, "--block-q", "32", "--block-k", "32", "--tolerance", "0.3"]
    job += ["--search", "one-tolerance"]  # prompts are too short for sparsity to pay
    assert tune.main([*job, "--dtype", "float32"]) == 0
    profile = load_profile(output)
    assert [len(layer.levels[0].heads) for layer in profile.layers] == [4, 4]
    assert any(head.tau < 1 for head in profile.heads_of(profile.level_index()))
    assert profile.tuned_on is not None
    assert profile.tuned_on.engine.startswith("vllm ")
    given = ["--profile", str(output), "--output", str(tmp_path / "q.json"), "--text", __file__]
    given += ["--tests", "perplexity", "prefixes", "--prefixes", "4", "--windows", "2"]
    assert evaluate([str(model), *given, "--dtype", "float32"]) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert report["through"] == profile.tuned_on.engine
    assert report["sparsity"] > 0.05
