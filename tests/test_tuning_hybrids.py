"""Tuning models of which only some layers have full attention, run by transformers."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import hybrids
from tests.tuning_jobs import command, save_byte_tokenizer
from vllm_afbs import tune
from vllm_afbs.commands import arguments
from vllm_afbs.demo.server import SERVER_ENVIRONMENT
from vllm_afbs.errors import InputError
from vllm_afbs.evaluate.in_process import Runner
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.engine import EndToEnd
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import HeadProfile

LENGTH = 600  # more than two chunks
TOKENS = [(7 * row * row) % 253 + 3 for row in range(LENGTH)]
REFUSED = ("gemma-2", "gpt-oss", "qwen-3-next")  # soft-capping, sinks, transformers' own refusal
TUNABLE = [name for name in hybrids.CONFIGS if name not in REFUSED]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("hybrids")
    return {name: hybrids.save(name, folder / name) for name in TUNABLE}


@pytest.mark.parametrize("name", TUNABLE)
def test_layers_without_full_attention_are_as_transformers_has_them(
    name: str, models: Mapping[str, Path]
) -> None:
    """Against transformers' own attention, which makes its masks itself."""
    from transformers import AutoModelForCausalLM

    model = open_model(str(models[name]))
    assert model.full_layers == hybrids.full_layers(name)
    shares = [5] if name == "gemma-4" else []
    assert model.tunable_layers == [i for i in model.full_layers if i not in shares]
    kind: Any = AutoModelForCausalLM
    own = kind.from_pretrained(
        models[name], config=copy.deepcopy(model.config), attn_implementation="eager",
        dtype=torch.float32,
    )  # fmt: skip
    with torch.inference_mode():
        logits = own(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0, :-1]
    expected = torch.log_softmax(logits.float(), -1)
    ours = EndToEnd(model, 128, 128)
    dense = ours.predict(TOKENS, {})
    torch.testing.assert_close(dense.log_probs, expected, atol=2e-4, rtol=0)

    # Only layers with thresholds change, and all of those do.
    head = HeadProfile(tau=0.2, theta=-1.0)
    for layer in model.full_layers:
        thresholds = {layer: HeadThresholds.of([head] * model.fingerprint.num_heads)}
        assert ours.predict(TOKENS, thresholds).kl_to(dense) > 1e-6


def test_a_hybrid_is_tuned_in_its_full_layers(
    models: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, output = models["gemma-3"], tmp_path / "profile.json"
    save_byte_tokenizer(directory)
    job = command(directory, output, "--tolerance", "0.3")
    assert tune.main(job) == 0
    profile = load_profile(output)
    assert profile.schema_version == 4
    assert profile.full_layers == [2, 4]
    assert [[len(level.heads) for level in layer.levels] for layer in profile.layers] == [
        [], [], [4] * len(profile.levels), [], [4] * len(profile.levels),
    ]  # fmt: skip
    assert profile.num_tuned_heads == 8
    assert any(head.tau < 1 for head in profile.layers[2].levels[profile.level_index()].heads)
    printed = capsys.readouterr().out
    assert "2 of 5 layers have full attention" in printed
    report = output.with_suffix(".html").read_text(encoding="utf-8")
    assert "<td>2 of 5 layers have full attention</td>" in report

    other = tmp_path / "other.json"
    assert tune.main(command(directory, other, "--layers", "0-2")) == 2
    line = "--layers: layers with full attention to keys of their own expected (2, 4), got 0-1"
    assert line in capsys.readouterr().err


def test_vllm_tunes_a_hybrid_whose_last_layers_share_keys(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SERVER_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    directory, output = models["gemma-4"], tmp_path / "profile.json"
    save_byte_tokenizer(directory)
    job = command(directory, output, "--tolerance", "0.3", "--dtype", "float32")
    # vLLM's pages of this model do not fit into blocks, so it cannot run it sparse.
    job += ["--search", "one-tolerance"]
    job[job.index(arguments.TRANSFORMERS)] = arguments.VLLM
    assert tune.main(job) == 0
    profile = load_profile(output)
    assert profile.full_layers == [1, 3, 5]
    assert (profile.model.num_kv_heads, profile.model.head_dim) == (1, 64)
    assert profile.num_tuned_heads == 8
    assert not profile.layers[5].levels[0].heads[0].calibration


def test_what_transformers_cannot_evaluate_is_refused(models: Mapping[str, Path]) -> None:
    with pytest.raises(InputError, match=r"in all 2 layers expected .* 1 have it: .*--engine vllm"):
        Runner(open_model(str(models["llama-4"])))


def test_models_without_any_full_attention_are_refused(tmp_path: Path) -> None:
    config = hybrids.config("olmo-3") | {"layer_types": [hybrids.SLIDING] * 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"full_attention expected in some layer, got sliding_a"):
        open_model(str(tmp_path))
