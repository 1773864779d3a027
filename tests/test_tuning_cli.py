"""The tuner's command line on a tiny random model: whole jobs, killed jobs and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning_jobs import command, result, start, wait_for_steps, where
from vllm_afbs import tune
from vllm_afbs.commands.tuning_options import tuning_parser
from vllm_afbs.errors import InputError
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.texts import Text
from vllm_afbs.tuning.windows import cut_windows


def test_killed_and_resumed_equals_uninterrupted(
    tiny_model: Path, tiny_profile: Profile, tmp_path: Path
) -> None:
    killed = tmp_path / "killed.json"
    job = start(command(tiny_model, killed, "--tolerance", "0.2"))
    wait_for_steps(job, killed, 4)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not killed.exists()
    journal = Path(f"{killed}.work") / "journal.jsonl"
    done = journal.read_text().splitlines()
    # As if the kill had come in the middle of a write.
    with journal.open("a") as file:
        file.write('{"step": "layer 0 tri')

    assert tune.main(command(tiny_model, killed, "--tolerance", "0.2", "--resume")) == 0
    assert result(load_profile(killed)) == result(tiny_profile)
    assert len(done) >= 4
    assert not Path(f"{killed}.work").exists()


@pytest.mark.parametrize(
    ("reach", "has_gpu", "expected"),
    [
        (131_072, True, [8192, 16384, 32768]),
        (131_072, False, [2048, 4096, 8192]),
        (20_000, True, [4096, 8192, 16384]),
        (8192, True, [2048, 4096, 8192]),
        (5000, False, [1024, 2048, 4096]),
        (2048, True, [512, 1024, 2048]),
        (1024, True, [256, 512, 1024]),
    ],
)
def test_lengths_by_default_are_the_longest_that_are_in_reach(
    reach: int, has_gpu: bool, expected: list[int]
) -> None:
    assert tune.default_lengths(reach, has_gpu) == expected


def test_interrupt_says_how_to_go_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "profile.json"
    job = start(command(tiny_model, output))
    wait_for_steps(job, output, 2)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Traceback" not in errors
    assert f"--output {output}" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].endswith("--resume")
    assert not output.exists()

    # The same command without --resume, with other settings, another selector or another search
    # does not touch it.
    before = sorted(path.name for path in Path(f"{output}.work").rglob("*"))
    assert tune.main(command(tiny_model, output)) == 2
    assert tune.main(command(tiny_model, output, "--resume", "--tolerance", "0.2")) == 2
    for version in ("FORMAT_VERSION", "SCHEMA_VERSION", "SEARCH_VERSION"):
        with monkeypatch.context() as patched:
            patched.setattr(f"vllm_afbs.tuning.journal.{version}", 1)
            assert tune.main(command(tiny_model, output, "--resume")) == 2
    assert sorted(path.name for path in Path(f"{output}.work").rglob("*")) == before


def test_profile_says_what_was_measured(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of {i * i % 97} things\n" for i in range(60)))
    output = tmp_path / "profile.json"
    arguments = command(
        tiny_model, output, "--calibration", str(text), "--tolerance", "0.2", "--seed", "7"
    )
    assert tune.main(arguments) == 0
    profile = load_profile(output)
    assert (profile.min_seq_len, profile.max_seq_len) == (128, 256)
    assert (profile.block_q, profile.block_k) == (16, 16)
    assert (profile.tuner.seed, profile.tuner.tolerance) == (7, 0.2)
    (source,) = profile.calibration_texts
    # The calibration window and two held-out ones, of 256 each.
    assert (source.name, source.num_tokens) == (str(text), 3 * 256)
    assert profile.default_level == "balanced"
    assert any(head.tau < 1 for head in profile.heads_of(profile.level_index()))
    for index, layer in enumerate(profile.layers):
        for number, level in enumerate(layer.levels):
            for head in level.heads:
                assert [measured.length for measured in head.calibration] == [128, 256]
                assert head.validation is not None
                assert head.validation.error <= 1.2 * profile.tolerance_of(index, number)
                assert head.tau == 1 or head.validation.sparsity >= 0.09
    for level in profile.levels:
        assert level.whole_model is not None
        assert [each.length for each in level.by_length] == [128, 256]
    assert profile.tuner.settings["levels_measured_at"] == 128
    assert f"{profile.tuner.evaluations} evaluations" in capsys.readouterr().out


def test_every_text_is_in_the_profile(tiny_model: Path, tmp_path: Path) -> None:
    for index in range(2):
        lines = [f"text {index}, line {i} of {i * (i + index) % 97}\n" for i in range(60)]
        (tmp_path / f"{index}.txt").write_text("".join(lines))
    paths = [str(tmp_path / f"{index}.txt") for index in range(2)]
    output = tmp_path / "profile.json"
    arguments = command(tiny_model, output, "--tolerance", "0.2", "--calibration", *paths)
    assert tune.main(arguments) == 0
    profile = load_profile(output)
    # Half of the calibration window of 256, and a held-out window.
    assert [(text.name, text.num_tokens) for text in profile.calibration_texts] == [
        (path, 128 + 256) for path in paths
    ]
    assert len({text.sha256 for text in profile.calibration_texts}) == 2
    level = profile.level_index()
    for index, layer in enumerate(profile.layers):
        for head in layer.levels[level].heads:
            assert head.validation is not None
            assert head.validation.error <= 1.2 * profile.tolerance_of(index, level)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=5))
def test_layers_are_what_the_ranges_name(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in ranges)
    named = {first + step for first, more in ranges for step in range(more + 1)}
    options = tuning_parser("tune").parse_args(["--model", "m", "--output", "p", "--layers", text])
    every = list(range(50))
    assert tune._layers(options.layers, 50, every) == sorted(named)
    with pytest.raises(InputError, match=f"got {max(named)}$"):
        tune._layers(options.layers, max(named), every)
    # Of the named layers, those that cannot be tuned are refused.
    with pytest.raises(InputError, match=rf"of their own expected \(51\), got {min(named)}\b"):
        tune._layers(options.layers, 52, [51])
    with pytest.raises(InputError, match="full attention in some layer expected"):
        tune._layers(options.layers, 50, [])


def test_layers_left_out_are_dense(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "profile.json"
    chosen = command(tiny_model, output, "--layers", "1", "--tolerance", "0.2")
    job = start(chosen)
    wait_for_steps(job, output, 3)
    job.kill()
    job.communicate()
    kept = {path.name.split(".")[0] for path in Path(f"{output}.work").rglob("layer-*")}
    assert kept == {"layer-001"}
    assert tune.main([*command(tiny_model, output, "--tolerance", "0.2"), "--resume"]) == 2
    assert "layers is [1] in it and [0, 1] now" in capsys.readouterr().err

    assert tune.main([*chosen, "--resume"]) == 0
    profile = load_profile(output)
    for head in profile.layers[0].levels[0].heads:
        assert (head.tau, head.theta, head.calibration, head.validation) == (1.0, -1.0, [], None)
    assert any(head.tau < 1.0 for head in profile.layers[1].levels[profile.level_index()].heads)
    assert profile.tuner.settings["layers"] == [1]
    assert f"({profile.tuner.evaluations / 4:.1f} a head)" in capsys.readouterr().out


def test_one_tolerance_makes_one_level_and_runs_no_model(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "profile.json"
    one = command(tiny_model, output, "--tolerance", "0.2", "--search", "one-tolerance")
    monkeypatch.setattr(TransformersEngine, "sparse_model", pytest.fail)
    assert tune.main(one) == 0
    profile = load_profile(output)
    (level,) = profile.levels
    assert (level.name, level.tolerance, level.whole_model) == ("balanced", 0.2, None)
    assert any(layer.levels[0].is_sparse for layer in profile.layers)
    for head in profile.heads_of(0):
        assert head.calibration[-1].error <= 0.2
        assert head.validation is not None
        assert head.validation.error <= 1.2 * 0.2
    again = command(tiny_model, tmp_path / "p.json", "--search", "one-tolerance", "--max-kl", "0.1")
    assert tune.main(again) == 2
    assert "--search: analytic or ax expected with --max-kl" in capsys.readouterr().err


def test_capture_is_what_the_model_attends_to(tiny_model: Path, tmp_path: Path) -> None:
    """Rebuilds every layer's attention output from the capture and the model's own weights."""
    from transformers import AutoModel

    model = open_model(str(tiny_model))
    windows = cut_windows(
        model.tokenizer(), [Text("text", "some text to attend to " * 50)], 64
    ).windows
    steps: list[float] = []
    taken = capture(model, TransformersEngine(model), windows, range(2), tmp_path, steps.append)
    assert steps == [1.0] * 6
    body = AutoModel.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(body.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.__setitem__(index, inputs[0][0])
        )
    for window in windows:
        with torch.inference_mode():
            body(input_ids=torch.tensor([windows[window]]))
        for index in range(2):
            layer = taken.load(index, window)
            query, key, value = (
                t.float().transpose(0, 1) for t in (layer.query, layer.key, layer.value)
            )
            scores = query @ key.repeat_interleave(2, 0).transpose(1, 2) * layer.softmax_scale
            scores.masked_fill_(torch.ones(64, 64).triu(1).bool(), -torch.inf)
            output = scores.softmax(-1) @ value.repeat_interleave(2, 0)
            output = output.transpose(0, 1).flatten(1)
            # bf16 keeps 8 bits of Q, K and V.
            error = float((output - seen[index]).abs().sum() / seen[index].abs().sum())
            assert error < 0.02


def edited(tiny_model: Path, tmp_path: Path, **fields: object) -> Path:
    """A copy of the model with other fields in its config.json."""
    directory = tmp_path / "edited"
    shutil.copytree(tiny_model, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


BadInput = Callable[[Path, Path], tuple[list[str], str]]


def _missing_model(model: Path, tmp: Path) -> tuple[list[str], str]:
    return command(tmp / "none", tmp / "p.json"), "none: no such directory"


def _no_config(model: Path, tmp: Path) -> tuple[list[str], str]:
    (tmp / "empty").mkdir()
    return command(tmp / "empty", tmp / "p.json"), "empty: config.json expected"


def _broken_config(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(model, tmp)
    (directory / "config.json").write_text("{")
    return command(directory, tmp / "p.json"), "edited: cannot read config.json: "


def _encoder(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(model, tmp, model_type="bert", architectures=["BertForMaskedLM"])
    return command(directory, tmp / "p.json"), "architectures: a decoder-only causal language model"


def _latent_attention(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(
        model, tmp, model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"]
    )
    return command(directory, tmp / "p.json"), "kv_lora_rank: dense latent attention (MLA) is not"


def _position_biases(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(model, tmp, model_type="bloom", architectures=["BloomForCausalLM"])
    return command(directory, tmp / "p.json"), "bloom has position biases (ALiBi)"


def _sliding_window(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(
        model,
        tmp,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        sliding_window=64,
    )
    return command(
        directory, tmp / "p.json"
    ), "sliding_window: null expected, or at least max_position_embeddings (1024), got 64"


def _no_weights(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(model, tmp)
    (directory / "model.safetensors").unlink()
    return command(directory, tmp / "p.json"), "the weights' file model.safetensors expected in "


def _cut_weights(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(model, tmp)
    os.truncate(directory / "model.safetensors", 5000)
    return command(directory, tmp / "p.json"), "edited: cannot load the weights: "


def _lacking_weights(model: Path, tmp: Path) -> tuple[list[str], str]:
    directory = edited(model, tmp, num_hidden_layers=3)
    return command(directory, tmp / "p.json"), "edited: the weights lack layers.2."


def _short_text(model: Path, tmp: Path) -> tuple[list[str], str]:
    (tmp / "short.txt").write_text("x" * 300)
    return (
        command(model, tmp / "p.json", "--calibration", str(tmp / "short.txt")),
        "short.txt: the calibration text has 300 tokens, 512 expected",
    )


def _short_second_text(model: Path, tmp: Path) -> tuple[list[str], str]:
    (tmp / "long.txt").write_text("x" * 1000)
    (tmp / "short.txt").write_text("x" * 383)
    return (
        command(
            model, tmp / "p.json", "--calibration", str(tmp / "long.txt"), str(tmp / "short.txt")
        ),
        "short.txt: the calibration text has 383 tokens, 384 expected",
    )


def _directory_without_data(model: Path, tmp: Path) -> tuple[list[str], str]:
    (tmp / "set").mkdir()
    return (
        command(model, tmp / "p.json", "--calibration", str(tmp / "set")),
        "set: a data set expected: one saved by save_to_disk, or files ending in ",
    )


def _missing_text(model: Path, tmp: Path) -> tuple[list[str], str]:
    return (
        command(model, tmp / "p.json", "--calibration", str(tmp / "none.txt")),
        "none.txt: cannot read the calibration text: No such file",
    )


def _binary_text(model: Path, tmp: Path) -> tuple[list[str], str]:
    (tmp / "binary").write_bytes(b"\xff\xfe" * 5000)
    return (
        command(model, tmp / "p.json", "--calibration", str(tmp / "binary")),
        "binary: cannot read the calibration text: UTF-8 text expected",
    )


def _too_long(model: Path, tmp: Path) -> tuple[list[str], str]:
    return (
        command(model, tmp / "p.json", "--lengths", "256", "2048"),
        "--lengths: at most 1024 (max_position_embeddings, or --max-model-len), got 2048",
    )


def _one_length(model: Path, tmp: Path) -> tuple[list[str], str]:
    return (
        command(model, tmp / "p.json", "--lengths", "256"),
        "--lengths: at least two different lengths up to 1024 expected, got [256]",
    )


def _no_such_layer(model: Path, tmp: Path) -> tuple[list[str], str]:
    return (
        command(model, tmp / "p.json", "--layers", "0,1-99999999999"),
        "--layers: layers from 0 to 1 expected, got 99999999999",
    )


def _no_cluster(model: Path, tmp: Path) -> tuple[list[str], str]:
    return (
        command(model, tmp / "p.json", "--ray-address", "127.0.0.1:1"),
        "--ray-address: 127.0.0.1:1: [Errno 111] Connection refused",
    )


def _no_output_directory(model: Path, tmp: Path) -> tuple[list[str], str]:
    return command(model, tmp / "none" / "p.json"), "none: cannot write there: No such file"


def _output_is_directory(model: Path, tmp: Path) -> tuple[list[str], str]:
    return command(model, tmp), ": a file expected for --output"


def _output_is_no_name(model: Path, _: Path) -> tuple[list[str], str]:
    return command(model, Path("/")), "/: a file expected for --output"


def _damaged_journal(model: Path, tmp: Path) -> tuple[list[str], str]:
    (tmp / "p.json.work").mkdir()
    (tmp / "p.json.work" / "journal.jsonl").write_text("not JSON\n")
    return command(
        model, tmp / "p.json", "--resume"
    ), "journal.jsonl: line 1: the job's settings expected"


@pytest.mark.parametrize(
    "bad_input",
    [
        _missing_model,
        _no_config,
        _broken_config,
        _encoder,
        _latent_attention,
        _position_biases,
        _sliding_window,
        _no_weights,
        _cut_weights,
        _lacking_weights,
        _short_text,
        _short_second_text,
        _directory_without_data,
        _missing_text,
        _binary_text,
        _too_long,
        _one_length,
        _no_such_layer,
        _no_cluster,
        _no_output_directory,
        _output_is_directory,
        _output_is_no_name,
        _damaged_journal,
    ],
    ids=lambda case: case.__name__.strip("_"),
)
def test_bad_input_is_one_line(
    bad_input: BadInput, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = bad_input(tiny_model, tmp_path)
    assert tune.main(arguments) == 2
    # The weights' cases come after the first progress bar, which rich draws on the same stream.
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("vllm-afbs-tune: error: ")
    assert expected in lines[0]
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tolerance", "nan"),
        ("--tolerance", "0"),
        ("--block-q", "-1"),
        ("--layers", "3-1"),
        ("--layers", "1,,2"),
        ("--layers", "all"),
        ("--layers", "²"),
        ("--workers", "0"),
        ("--ray-address", "ray://head:10001"),
        ("--ray-address", "head:65536"),
        ("--ray-address", "head"),
    ],
)
def test_bad_options_are_refused_by_name(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--model", "m", "--output", "p.json", option, value])
    assert stopped.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_adapters_are_refused_without_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main([*where(Path("m"), Path("p.json")), "--enable-lora", "--lora-modules", "one=a"])
    assert stopped.value.code == 2
    line = (
        "--lora-modules one=a (arguments of vllm serve, and so LoRA adapters, need --engine vllm)"
    )
    assert line in " ".join(capsys.readouterr().err.split())


def test_damaged_capture_is_named(tiny_model: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_model))
    cut = cut_windows(model.tokenizer(), [Text("text", "text " * 100)], 64)
    taken = capture(
        model, TransformersEngine(model), cut.windows, range(2), tmp_path, lambda _: None
    )
    path = taken.path(1, "validation-0-0")
    os.truncate(path, 100)
    with pytest.raises(InputError, match=r"layer-001\.validation-0-0\.safetensors: cannot read"):
        taken.load(1, "validation-0-0")


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys\n"
        "from vllm_afbs import tune\n"
        "try:\n    tune.main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'ax', 'transformers', 'rich', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
