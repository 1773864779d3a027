"""vLLM as the tuner's and the evaluation's engine, beside transformers in this process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.profiles import uniform_profile
from tests import hybrids
from tests.models import merged, save_adapter
from tests.quantised_checkpoints import quantise
from tests.tuning_jobs import IN_PROCESS, save_byte_tokenizer, save_tiny_model, start
from vllm_afbs import tune
from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.engine import client, opening, room
from vllm_afbs.engine.client import VllmEngine
from vllm_afbs.engine.process import EngineProcess
from vllm_afbs.engine.sparse_model import EngineAdapter
from vllm_afbs.errors import InputError
from vllm_afbs.evaluate import __main__ as evaluate
from vllm_afbs.evaluate.baselines import of_profile
from vllm_afbs.evaluate.engine import InEngine
from vllm_afbs.evaluate.in_process import InProcess, Runner
from vllm_afbs.evaluate.methods import Selection
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.weights import adapter_sha256
from vllm_afbs.tuning.allocation.adapters import LARGEST_KL_RATIO
from vllm_afbs.tuning.capture import capture

pytest.importorskip("vllm", reason="vLLM is not installed")

LENGTH, BLOCK = 300, 32
WINDOWS = {
    CALIBRATION: [(7 * i + i // 9) % 256 for i in range(LENGTH)],
    "validation-0-0": [(11 * i + 3) % 256 for i in range(LENGTH)],
}
SERVE = ["--dtype", "float32", "--max-num-batched-tokens", "256", "--max-num-seqs", "4"]
TEXT = Path(__file__)
SMALL = ["--lengths", "256", "512", "--block-q", str(BLOCK), "--block-k", str(BLOCK)]
SMALL += ["--tolerance", "0.3"]
ONE_LEVEL = [*SMALL, "--search", "one-tolerance"]
"""Levels divide the error by runs of the model, which differ a little from engine to engine."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads of a size that vLLM's CPU kernels have."""
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, hidden_size=128)
    return directory


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA adapters for it, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(folder / name, seed) for seed, name in enumerate(("one", "other"))}


@pytest.fixture(scope="module")
def engine(model: Path, adapters: dict[str, Path]) -> Iterator[VllmEngine]:
    """An engine with chunks of 256 tokens, shared by all that leave it as it was.

    Most run its base model, to which LoRA adapters that are loaded as well do nothing.
    """
    with VllmEngine([str(model), *SERVE, *lora(**adapters)], BLOCK, with_adapters=True) as running:
        yield running


@pytest.fixture(scope="module")
def captured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """What transformers captures."""
    own = open_model(str(model))
    folder = tmp_path_factory.mktemp("transformers")
    return capture(own, TransformersEngine(own), WINDOWS, [0, 1], folder, lambda _: None)


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("profile") / "profile.json"
    assert tune.main([str(model), "--output", str(output), *ONE_LEVEL, *IN_PROCESS]) == 0
    return output


def lora(**adapters: Path) -> list[str]:
    """What ``vllm serve`` is given for LoRA adapters."""
    return ["--enable-lora", "--lora-modules", *(f"{n}={path}" for n, path in adapters.items())]


def assert_same(one: Capture, other: Capture) -> None:
    for layer in one.layers:
        for window in WINDOWS:
            mine, theirs = one.load(layer, window), other.load(layer, window)
            assert mine.softmax_scale == theirs.softmax_scale
            for name in ("query", "key", "value"):
                a, b = getattr(mine, name).double(), getattr(theirs, name).double()
                # One step of bf16, where rounding falls to the other side.
                torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


def test_captures_are_what_transformers_captures(
    engine: VllmEngine, captured: Capture, tmp_path: Path
) -> None:
    done: list[float] = []
    found = capture(engine, engine, WINDOWS, [0, 1], tmp_path, done.append)
    assert sum(done) == 4
    assert_same(found, captured)
    assert not list(tmp_path.rglob("*.partial"))
    # A window that is there is not computed again, and only the layers asked for are kept.
    found.path(1, CALIBRATION).unlink()
    again = capture(engine, engine, WINDOWS, [1], tmp_path, done.append)
    assert_same(again, captured)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_candidates_are_measured_as_by_transformers(
    model: Path, engine: VllmEngine, adapters: dict[str, Path], with_adapter: bool, tmp_path: Path
) -> None:
    """With a LoRA adapter, as if it were part of the weights."""
    source: VllmEngine | EngineAdapter = engine
    if with_adapter:
        model, source = merged(model, adapters["one"], tmp_path / "merged"), engine.adapters[0]
    own = TransformersEngine(open_model(str(model))).sparse_model(BLOCK, BLOCK)
    theirs = source.sparse_model(BLOCK, BLOCK)
    thresholds = {
        layer: HeadThresholds(torch.full((4,), tau), torch.full((4,), theta))
        for layer, tau, theta in ((0, 0.8, 0.1), (1, 0.6, -1.0))
    }
    for tokens in WINDOWS.values():
        for chosen in ({1: thresholds[1]}, thresholds, {}):
            # The server's chunks are whole query blocks, so both select the same blocks.
            one, other = (each.compare(tokens, chosen) for each in (own, theirs))
            assert other.kl == pytest.approx(one.kl, rel=1e-2, abs=1e-5)
            assert (other.kl > 0.01) == bool(chosen)
            assert other.dense_loss == pytest.approx(one.dense_loss, rel=1e-4)
            assert other.loss == pytest.approx(one.loss, rel=1e-3)
        losses = [each.losses(tokens, thresholds) for each in (own, theirs)]
        torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)


def test_pages_that_blocks_do_not_fit_are_no_candidate(engine: VllmEngine) -> None:
    heads = HeadThresholds(torch.full((4,), 0.5), torch.full((4,), -1.0))
    line = r"2 layers of the profile dense: layer 0 \(page_size;.*; --search one-tolerance tunes"
    with pytest.raises(InputError, match=line):
        engine.sparse_model(16, 16).compare(WINDOWS[CALIBRATION], {0: heads, 1: heads})
    # What failed is served all the same, so dense has to be asked for again.
    engine.serve(None)


def test_an_adapter_that_vllm_would_run_dense_is_not_measured(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its files had changed since the profile's digest was taken."""
    monkeypatch.setitem(engine.description.adapters, "one", "0" * 64)
    heads = HeadThresholds(torch.full((4,), 0.5), torch.full((4,), -1.0))
    one, _ = (each.sparse_model(BLOCK, BLOCK) for each in engine.adapters)
    with pytest.raises(InputError, match=r"--lora-modules: one: vLLM has loaded other files"):
        one.compare(WINDOWS[CALIBRATION], {0: heads, 1: heads})


def test_evaluations_agree(model: Path, engine: VllmEngine, profile: Path) -> None:
    """Losses, next tokens, answers and sparsity, beside the model in this process."""
    # Chunks have 256 tokens. In each so little is kept that the server leaves none dense.
    tuned = uniform_profile(
        load_profile(profile).model, 0.3, 0.5, [256, 512], block_q=BLOCK, block_k=BLOCK
    )
    runner = Runner(open_model(str(model)))
    engine.loaded()
    tokens = (WINDOWS[CALIBRATION] * 2)[:500]
    # One chunk each: vLLM cuts longer prompts that wait together at other rows than alone.
    prefixes = [(tokens[:256], 5), (tokens[3:259], 9)]
    for chosen, selection in ((None, None), (tuned, Selection(of_profile("afbs", tuned), 0.0))):
        here, there = InProcess(runner, selection), InEngine(engine, chosen, set())
        before = engine.products()
        torch.testing.assert_close(here.losses(tokens), there.losses(tokens), rtol=2e-2, atol=2e-2)
        grown = {name: value - before[name] for name, value in engine.products().items()}
        if chosen is not None:
            assert grown["skipped"] / sum(grown.values()) == pytest.approx(
                here.sparsity(), abs=1e-3
            )
        else:
            assert not any(grown.values())
        pairs = zip(here.next_tokens(prefixes), there.next_tokens(prefixes), strict=True)
        for one, other in pairs:
            assert other.loss == pytest.approx(one.loss, abs=0.05)
            for token, probability in other.top.items():
                assert one.top.get(token, probability) == pytest.approx(probability, abs=0.01)
        assert there.generate([tokens[:60]], 3) == here.generate([tokens[:60]], 3)


def test_levels_are_validated_with_adapters(
    model: Path, engine: VllmEngine, adapters: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = []

    def opened(
        options: Any, serve: Sequence[str], block_k: Callable[[], int], with_adapters: bool
    ) -> Any:
        asked.append((block_k(), with_adapters))
        return nullcontext((engine, engine))

    monkeypatch.setattr(opening, "opened", opened)
    monkeypatch.setattr(engine, "make_room", lambda: None)  # to load it again would take seconds
    output = tmp_path / "profile.json"
    assert tune.main([str(model), "--output", str(output), *SMALL]) == 0
    assert asked == [(BLOCK, True)]
    assert "LoRA adapters: 'one' (" in capsys.readouterr().out
    assert "LoRA adapters" in output.with_suffix(".html").read_text(encoding="utf-8")
    tuned = load_profile(output)
    assert {each.name: each.sha256 for each in tuned.adapters} == {
        name: adapter_sha256(path) for name, path in adapters.items()
    }
    num_sparse = 0
    for level, *of_adapters in zip(tuned.levels, *(a.levels for a in tuned.adapters), strict=True):
        assert level.whole_model is not None
        base = level.whole_model.kl
        assert all(own.holds == (own.kl <= LARGEST_KL_RATIO * base) for own in of_adapters)
        # Each diverges in its own way, but where no layer is sparse.
        assert len({base, *(own.kl for own in of_adapters)}) == (3 if base else 1)
        num_sparse += base > 0
    assert num_sparse > 1

    assert tune.main([str(model), "--output", str(output), *ONE_LEVEL]) == 2
    assert "--lora-modules: --search analytic or ax expected" in capsys.readouterr().err
    assert load_profile(output) == tuned


def test_ranks_write_what_one_rank_does(
    model: Path, captured: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's CPU workers each want cores of their own; they may share one all the same.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    with VllmEngine([str(model), *SERVE, "--tensor-parallel-size", "2"], BLOCK) as two:
        found = capture(two, two, WINDOWS, [0, 1], tmp_path, lambda _: None)
    assert_same(found, captured)
    assert not list(tmp_path.rglob("*.rank*"))


@pytest.mark.parametrize(("name", "softcap"), [("gpt-oss", 0.0), ("gemma-2", 50.0)])
def test_sinks_and_soft_caps_are_captured_and_kept(
    name: str, softcap: float, tmp_path: Path
) -> None:
    """In the layer with full attention of a hybrid: transformers does not tune these."""
    directory = hybrids.save(name, tmp_path / "model")
    save_byte_tokenizer(directory)
    (full,) = hybrids.full_layers(name)
    weights = load_file(directory / "model.safetensors")
    sinks = weights.get(f"model.layers.{full}.self_attn.sinks")
    with VllmEngine([str(directory), *SERVE], BLOCK) as hybrid:
        taken = capture(hybrid, hybrid, WINDOWS, [full], tmp_path, lambda _: None)
        found = taken.load(full, CALIBRATION)
        assert found.softcap == softcap
        assert (found.sink is None) == (sinks is None)
        if found.sink is not None and sinks is not None:
            torch.testing.assert_close(found.sink, sinks.float())
        model = hybrid.sparse_model(BLOCK, BLOCK)
        guarded, chosen = (
            {full: HeadThresholds(torch.full((4,), 0.3), torch.full((4,), theta))}
            for theta in (1.0, -1.0)
        )
        # Every block is below the one theta, so all are kept and nothing may change.
        assert model.compare(WINDOWS[CALIBRATION], guarded).kl < 1e-6
        assert model.compare(WINDOWS[CALIBRATION], chosen).kl > 1e-4


def test_a_quantised_checkpoint_is_tuned_and_measured(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights in 8 bits, which transformers would decode and vLLM computes with."""
    checkpoint, output = tmp_path / "w8a8", tmp_path / "profile.json"
    quantise(model, checkpoint, "W8A8")
    started: list[Path] = []

    def start_process(log_file: Path) -> EngineProcess:
        started.append(log_file)
        return EngineProcess(log_file)

    for starts in (opening, client):
        monkeypatch.setattr(starts, "EngineProcess", start_process)
    assert tune.main([str(checkpoint), "--output", str(output), *SMALL]) == 0
    assert len(started) == 1, "small enough to stay loaded while layers are tuned"
    tuned = load_profile(output)
    assert tuned.tuned_on is not None
    assert tuned.tuned_on.quantization == "compressed-tensors"
    assert tuned.tuned_on.engine.startswith("vllm ")
    assert any(layer.levels[tuned.level_index()].is_sparse for layer in tuned.layers)
    given = ["--profile", str(output), "--output", str(tmp_path / "q.json"), "--text", str(TEXT)]
    given += ["--tests", "perplexity", "prefixes", "--prefixes", "4", "--windows", "2"]
    assert evaluate.main([str(checkpoint), *given]) == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert report["through"] == tuned.tuned_on.engine
    assert report["sparsity"] > 0.05
    assert "running the model in vllm" in capsys.readouterr().err


def test_an_interrupted_job_goes_on(model: Path, tmp_path: Path, profile: Path) -> None:
    output = tmp_path / "profile.json"
    arguments = [str(model), "--output", str(output), *ONE_LEVEL, *SERVE]
    job = start(arguments)
    work = Path(f"{output}.work")
    deadline = time.monotonic() + 200
    while not list(work.glob("capture-*/*.safetensors")):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 130
    assert "Continue with" in errors
    assert tune.main([*arguments, "--resume"]) == 0
    assert not work.exists()
    found, expected = (
        [head.tau for head in load_profile(each).heads_of(0)] for each in (output, profile)
    )
    assert found == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--load-format", "dummy"], "--load-format: the model's weights expected, got dummy"),
        (["--attention-backend", "CPU_ATTN"], "--attention-backend: afbs expected, got CPU_ATTN"),
        (["--no-such-option"], "vllm serve: unrecognized arguments: --no-such-option"),
    ],
)
def test_arguments_that_are_refused(model: Path, given: Sequence[str], line: str) -> None:
    from vllm_afbs.check.refusals import RefusedError
    from vllm_afbs.engine.arguments import parse

    with pytest.raises(RefusedError, match=line):
        parse([str(model), *given])


def test_arguments_that_mean_nothing_here_are_named(model: Path) -> None:
    from vllm_afbs.engine.arguments import parse

    serve = ["--port", "9", "--enable-prefix-caching", "--dtype", "float32", "--enable-lora"]
    serve += ["--attention-backend", "afbs"]
    for with_adapters in (False, True):  # there are none
        parsed = parse([str(model), *serve], with_adapters)
        assert parsed.unused == ["--enable-lora", "--enable-prefix-caching", "--port"]
        assert parsed.engine.dtype == "float32"
        assert parsed.engine.enforce_eager
        assert not parsed.engine.enable_prefix_caching
        assert not parsed.engine.enable_lora


def test_adapters_are_for_those_who_ask(model: Path) -> None:
    from vllm_afbs.engine.arguments import parse

    serve = [str(model), *lora(one=model), "--max-lora-rank", "64"]
    parsed = parse(serve, with_adapters=True)
    assert parsed.unused == []
    assert (parsed.engine.enable_lora, parsed.engine.max_lora_rank) == (True, 64)
    (adapter,) = parsed.adapters
    assert (adapter.lora_name, adapter.lora_int_id, adapter.lora_path) == ("one", 1, str(model))
    parsed = parse(serve)
    assert parsed.unused == ["--enable-lora", "--lora-modules"]
    assert not parsed.adapters
    assert not parsed.engine.enable_lora


def test_adapters_that_are_refused(model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Before anything is loaded."""
    from vllm_afbs.check.refusals import RefusedError
    from vllm_afbs.engine.host import Host

    adapter = adapters["one"]
    for given, line in (
        (lora(one=adapter)[1:], "--lora-modules: --enable-lora expected beside it"),
        ([*lora(one=adapter), f"one={model}"], "a name for each adapter expected, got one twice"),
        (lora(one=tmp_path), f"one: a directory with adapter_config.json .* got {tmp_path}"),
        ([*lora(one=adapter), "--max-lora-rank", "1"], "one: LoRA rank 8 is greater than max_lora"),
        (lora(one=adapter, two=adapter), "two: other files expected than those of adapters before"),
    ):
        with pytest.raises(RefusedError, match=line):
            Host().describe([str(model), *given], with_adapters=True)


def test_steps_are_as_large_as_a_servers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM chooses other sizes for other callers, and small ones where nobody says who calls."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_afbs.check.layers import parse_serve_arguments, server_config
    from vllm_afbs.engine.host import Host

    serving = UsageContext.OPENAI_API_SERVER
    monkeypatch.setattr(
        EngineArgs, "get_batch_defaults", lambda *_: ({serving: 1536}, {serving: 24})
    )
    host = Host()
    host.describe([str(model)], with_adapters=False)
    checked = server_config(parse_serve_arguments([str(model), "--attention-backend", "AFBS"]))
    for config in (host._config, host._arguments, checked):
        scheduler = getattr(config, "scheduler_config", config)
        assert scheduler.max_num_batched_tokens == 1536
        assert scheduler.max_num_seqs == 24


def test_a_process_that_dies_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "no such level")
    output = tmp_path / "profile.json"
    assert tune.main([str(model), "--output", str(output), *SMALL]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "vLLM" in line
    log = Path(line.rpartition("its log is ")[2])
    assert "no such level" in log.read_text(errors="replace").lower()
    log.unlink()


def test_a_host_ends_with_its_driver() -> None:
    ours, theirs = socket.socketpair()
    host = subprocess.Popen(
        [sys.executable, "-m", "vllm_afbs.engine.host", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": os.getcwd()},  # noqa: PTH109
    )
    theirs.close()
    ours.close()
    assert host.wait(60) == 1


def test_models_that_vllm_refuses_are_one_line(tmp_path: Path, model: Path) -> None:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3}))
    with (
        pytest.raises(InputError, match="num_key_value_heads: a divisor"),
        VllmEngine([str(tmp_path)]),
    ):
        pass


def test_a_cpu_keeps_what_a_few_prompts_need() -> None:
    """VLLM alone would take most of the machine's memory for its cache."""
    from vllm_afbs.engine import host

    model = SimpleNamespace(
        get_num_kv_heads=lambda _: 3,
        get_num_layers=lambda _: 30,
        get_head_size=lambda: 64,
        dtype=torch.bfloat16,
        max_model_len=131_071,
    )
    config = SimpleNamespace(model_config=model, parallel_config=None)
    # Two bytes for each of K and V.
    assert host._cache_bytes(config) == 131_072 * 30 * 3 * 64 * 2 * 2
    model.max_model_len = 100
    assert host._cache_bytes(config) == host.LEAST_CACHE_BYTES


def test_vllm_stays_loaded_where_it_leaves_the_search_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "device_bytes", lambda: 80 * 10**9)
    assert room.fits_beside_the_search(16 * 10**9, 16 * 10**9)
    assert not room.fits_beside_the_search(16 * 10**9, 17 * 10**9)
    assert not room.fits_beside_the_search(70 * 10**9, 10**9)
