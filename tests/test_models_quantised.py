"""Quantised checkpoints are decoded or refused; none is tuned on its packed numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import Weights, changed_model, fp8_by_block, fp8_by_tensor, is_linear
from tests.tuning_jobs import command
from vllm_afbs import tune
from vllm_afbs.errors import InputError
from vllm_afbs.models.in_process.quantised import ADVICE
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.models.in_process.weights import load_weights

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
NOTE = json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})


def fp8_without_scales(weights: Weights) -> Weights:
    return {
        name: weight.to(torch.float8_e4m3fn) if is_linear(name) else weight
        for name, weight in weights.items()
    }


def whole_numbers(weights: Weights) -> Weights:
    return {
        name: (weight * 100).to(torch.int8) if is_linear(name) else weight
        for name, weight in weights.items()
    }


def with_scales(weights: Weights) -> Weights:
    return weights | {f"{name}_scale": torch.ones(1) for name in weights if is_linear(name)}


def with_cache_scales(weights: Weights) -> Weights:
    return weights | {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}


Change = Callable[[Weights], Weights]
REFUSED: dict[str, tuple[Change | None, dict[str, Any], str | None, str]] = {
    "modelopt": (
        fp8_by_tensor, {"quantization_config": MODELOPT}, None,
        "quantization_config: quant_method 'modelopt': unknown to transformers",
    ),
    "a note of ModelOpt's alone": (fp8_by_tensor, {}, "hf_quant_config.json", "hf_quant_config"),
    "a note of AutoGPTQ's alone": (None, {}, "quantize_config.json", "quantize_config.json"),
    "FP8 with static scales": (
        fp8_by_tensor,
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        None, "",
    ),
    "an unknown method": (
        None, {"quantization_config": {"quant_method": "of_tomorrow"}}, None, "'of_tomorrow'",
    ),
    "no method": (None, {"quantization_config": {"bits": 4}}, None, "quant_method None"),
    "MLX": (None, {"quantization": {"bits": 4}}, None, "config.json: quantization: "),
    "an old compressor": (
        None, {"compression_config": {"format": "int"}}, None, "compression_config: ",
    ),
    "FP8 and nothing said": (
        fp8_without_scales, {}, None, "_proj.weight is stored as F8_E4M3" ,
    ),
    "FP8 with scales and nothing said": (fp8_by_tensor, {}, None, "is stored as F8_E4M3"),
    "whole numbers": (whole_numbers, {}, None, "is stored as I8"),
    "scales of plain weights": (with_scales, {}, None, ".weight_scale, which the model"),
    "scales of a cache": (with_cache_scales, {}, None, "k_proj.k_scale, which the model"),
    "FP8 blocks without scales": (
        fp8_without_scales,
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
        None, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_packed_numbers_are_never_tuned(
    case: tuple[Change | None, dict[str, Any], str | None, str],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    change, fields, note, expected = case
    model = changed_model(tiny_model, tmp_path / "model", change, **fields)
    if note:
        (model / note).write_text(NOTE)
    with pytest.raises(InputError) as refused:
        load_weights(open_model(str(model)), "sdpa", with_head=False)
    line = str(refused.value)
    assert line.startswith(f"{model}: ")
    assert expected in line
    assert ADVICE in line
    assert "\n" not in line


def test_the_tuner_writes_no_profile_of_packed_numbers(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As published by ModelOpt; the loader itself would take the numbers for the weights."""
    model = changed_model(tiny_model, tmp_path / "model", fp8_by_tensor)
    for fields in ({}, {"quantization_config": MODELOPT}):
        config = json.loads((tiny_model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))
        assert tune.main(command(model, tmp_path / "p.json")) == 2
        lines = [each for each in capsys.readouterr().err.splitlines() if "error:" in each]
        assert len(lines) == 1
        assert lines[0].startswith(f"vllm-afbs-tune: error: {model}: ")
        assert ADVICE in lines[0]
        assert not (tmp_path / "p.json").exists()
        shutil.rmtree(tmp_path / "p.json.work", ignore_errors=True)


@pytest.mark.parametrize(
    ("method", "settings", "package"),
    [
        ("awq", {"bits": 4, "group_size": 128}, "gptqmodel"),
        ("gptq", {"bits": 4, "group_size": 128}, "optimum|gptqmodel"),
        ("bitsandbytes", {"load_in_4bit": True}, "bitsandbytes"),
        ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes"),
        ("auto-round", {"bits": 4}, "auto-round"),
        ("torchao", {"quant_type": "int4_weight_only"}, "torchao"),
        ("quark", {}, "[Qq]uark"),
        ("hqq", {}, "HQQ|hqq"),
        ("quanto", {}, "quanto"),
        ("compressed-tensors", {"config_groups": 3}, "config_groups"),
        ("fp8", {"weight_block_size": [1]}, "weight_block_size"),
    ],
)
def test_a_method_says_what_it_lacks(
    method: str, settings: dict[str, Any], package: str, tiny_model: Path, tmp_path: Path
) -> None:
    how = {"quant_method": method, **settings}
    model = changed_model(tiny_model, tmp_path / "model", quantization_config=how)
    with pytest.raises(InputError, match=f"{method}.*({package}).*{ADVICE}") as refused:
        load_weights(open_model(str(model)), "sdpa", with_head=False)
    assert "\n" not in str(refused.value)


def test_blocks_of_fp8_are_decoded(tiny_model: Path, tmp_path: Path) -> None:
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    model = changed_model(tiny_model, tmp_path / "model", fp8_by_block, quantization_config=how)
    packed = load_file(model / "model.safetensors")
    check_decoded(
        model,
        lambda name: (
            packed[name].double().unflatten(1, (-1, 32)).unflatten(0, (-1, 32))
            * packed[f"{name}_scale_inv"].double()[:, None, :, None]
        ).flatten(2).flatten(0, 1),
    )  # fmt: skip


def test_compressed_tensors_are_decoded(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    how = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    model = changed_model(tiny_model, tmp_path / "model", fp8_by_tensor, quantization_config=how)
    packed = load_file(model / "model.safetensors")
    check_decoded(model, lambda name: packed[name].double() * packed[f"{name}_scale"].double())


def check_decoded(directory: Path, decoded: Callable[[str], torch.Tensor]) -> None:
    """The loaded weights are those of the file, with and without the head, and twice."""
    source = open_model(str(directory))
    for with_head in (False, True, True):
        model = load_weights(source, "sdpa", with_head=with_head)
        loaded = {name.removeprefix("model."): each for name, each in model.named_parameters()}
        linear = [name for name in loaded if is_linear(name) and name.endswith(".weight")]
        assert len(linear) == 14
        for name in linear:
            assert loaded[name].dtype == torch.float32
            # Some decoders go through bf16.
            torch.testing.assert_close(
                loaded[name].double(), decoded(f"model.{name}"), rtol=2**-8, atol=1e-6
            )


def test_layers_beyond_the_configuration_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(
        InputError, match=r"the weights hold model\.layers\.1\.\S+, which the model"
    ):
        load_weights(open_model(str(model)), "sdpa", with_head=False)


def test_weights_of_another_shape_are_named(tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model", num_key_value_heads=4)
    with pytest.raises(InputError) as refused:
        load_weights(open_model(str(model)), "sdpa", with_head=False)
    assert str(refused.value).endswith(
        "layers.0.self_attn.k_proj.weight of shape [32, 64], [64, 64] expected by config.json"
    )


def test_a_tied_head_that_is_stored_all_the_same_is_fine(tiny_model: Path, tmp_path: Path) -> None:
    model = changed_model(tiny_model, tmp_path / "model", tie_word_embeddings=True)
    for with_head in (False, True):
        load_weights(open_model(str(model)), "sdpa", with_head=with_head)
