"""LoRA: sparse in steps without an active adapter, vLLM's own dense attention in all others."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.layers import LoRAMapping

from tests.hybrid_engines import Run, engine, run_engines
from tests.hybrids import LENGTH
from tests.models import save_small_model
from tests.profiles import SMALL_MODEL, uniform_profile
from tests.test_hybrids import OURS, PRODUCTS, STOCK, difference
from vllm_afbs.backends import adapters
from vllm_afbs.backends.cpu.adapters import AfbsPunicaWrapperCPU
from vllm_afbs.backends.cuda.adapters import AfbsPunicaWrapperGPU
from vllm_afbs.backends.shared import StepSorter
from vllm_afbs.files import write_atomically
from vllm_afbs.serving import configuration

RANK, ADAPTER = 8, 7
LORA = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    "max_loras": 1,
    # Otherwise vLLM 0.32 also wraps the logits, and has no prompt's logprobs of two requests.
    "lora_target_modules": ["q_proj", "k_proj", "v_proj"],
}
BASE = {"lora": "base"}
NUM_LAYERS = SMALL_MODEL.num_layers


def save_adapter(directory: Path) -> Path:
    """An adapter of queries and keys, in the format of PEFT."""
    directory.mkdir()
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": ["q_proj", "k_proj"],
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    width = SMALL_MODEL.num_heads * SMALL_MODEL.head_dim
    widths = {"q_proj": width, "k_proj": SMALL_MODEL.num_kv_heads * SMALL_MODEL.head_dim}
    random = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(NUM_LAYERS):
        for name, rows in widths.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, width)), ("lora_B", (rows, RANK))):
                weights[f"{module}.{part}.weight"] = 0.3 * torch.randn(shape, generator=random)
    save_file(weights, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Engines by name. Each gets the same two prompts, in one step unless the name says turns."""
    folder = tmp_path_factory.mktemp("lora")
    model, adapter = save_small_model(folder / "model"), save_adapter(folder / "adapter")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    profile = folder / "profile.json"
    write_atomically(profile, uniform_profile(tau=0.5, min_seq_len=256).to_json())

    def served(given: list[Path | None], settings: Any = BASE, **more: Any) -> Any:
        return engine(model, OURS, profile, given, settings, **LORA | more)

    def stock(given: list[Path | None]) -> Any:
        return engine(model, STOCK, None, given, **LORA)

    both, mixed, none = [adapter, adapter], [adapter, None], [None, None]
    engines = {
        "stock, none": stock(none),
        "stock, both": stock(both),
        "stock, mixed": stock(mixed),
        "without LoRA": engine(model, OURS, profile),
        "none": served(none),
        "both": served(both),
        "mixed": served(mixed),
        "mixed, in turns": served(mixed, max_num_seqs=1),
        "none, not set": served(none, settings=None),
    }
    return dict(zip(engines, run_engines(list(engines.values()), folder), strict=True))


def num_skipped(run: Run) -> int:
    """Skipped block products of all layers."""
    assert {sum(products) for products in run["products"].values()} == {PRODUCTS}
    return sum(skipped for _, skipped in run["products"].values())


def prompt_difference(one: Run, other: Run, prompt: int) -> float:
    """The largest of one prompt's log probabilities."""
    pairs = zip(one["logprobs"][prompt], other["logprobs"][prompt], strict=True)
    return max(abs(mine - theirs) for mine, theirs in pairs)


def test_without_adapters_a_server_with_lora_is_one_without_lora(runs: dict[str, Run]) -> None:
    plain, base = runs["without LoRA"], runs["none"]
    assert num_skipped(plain) > 0
    assert difference(plain, runs["stock, none"]) > 1e-3  # sparse is something else than dense
    assert base["products"] == plain["products"]
    assert difference(base, plain) <= 1e-5
    assert base["fallbacks"] == plain["fallbacks"] == {}
    assert base["log"] == plain["log"]
    assert f"{NUM_LAYERS} of {NUM_LAYERS} layers sparse" in base["log"][-1]


def test_requests_with_an_adapter_run_in_vllms_dense_backend(runs: dict[str, Run]) -> None:
    both = runs["both"]
    assert prompt_difference(runs["stock, both"], runs["stock, none"], 0) > 1e-3  # it adapts
    assert difference(both, runs["stock, both"]) <= 1e-5
    assert both["fallbacks"] == {"active_adapter": 2 * NUM_LAYERS}
    assert both["products"] == {}
    told = [line for line in both["log"] if "active_adapter" in line]
    assert len(told) == 1


def test_one_adapter_makes_the_whole_step_dense(runs: dict[str, Run]) -> None:
    mixed = runs["mixed"]
    assert difference(mixed, runs["stock, mixed"]) <= 1e-5
    assert mixed["fallbacks"] == {"active_adapter": 2 * NUM_LAYERS}
    assert mixed["products"] == {}


def test_the_step_after_an_adapters_is_sparse_again(runs: dict[str, Run]) -> None:
    turns, sparse = runs["mixed, in turns"], runs["without LoRA"]
    assert prompt_difference(turns, runs["stock, both"], 0) <= 1e-5
    assert prompt_difference(turns, sparse, 1) <= 1e-5
    assert prompt_difference(turns, runs["stock, none"], 1) > 1e-3
    assert turns["fallbacks"] == {"active_adapter": NUM_LAYERS}
    assert turns["products"].keys() == sparse["products"].keys()
    assert {sum(products) for products in turns["products"].values()} == {PRODUCTS // 2}
    assert all(skipped > 0 for _, skipped in turns["products"].values())


def test_without_the_setting_the_whole_server_is_dense(runs: dict[str, Run]) -> None:
    unset = runs["none, not set"]
    assert difference(unset, runs["stock, none"]) <= 1e-5
    assert unset["fallbacks"] == {"lora": 2 * NUM_LAYERS}
    assert num_skipped(unset) == 0
    assert unset["log"][-1].endswith(f"0 of {NUM_LAYERS} layers sparse; {NUM_LAYERS} dense: lora.")


WRAPPERS: list[Any] = [
    AfbsPunicaWrapperCPU,
    pytest.param(AfbsPunicaWrapperGPU, marks=pytest.mark.gpu),
]


def make_wrapper(kind: Any) -> Any:
    device = "cpu" if kind is AfbsPunicaWrapperCPU else "cuda"
    config = SimpleNamespace(max_loras=1, specialize_active_lora=False)
    return kind(64, max_batches=8, device=device, lora_config=config)


def update(wrapper: Any, *requests: int) -> None:
    """Tells a wrapper of a step in which each request has two tokens, as vLLM does."""
    tokens = tuple(request for request in requests for _ in range(2))
    wrapper.update_metadata(LoRAMapping(tokens, requests, is_prefill=True), [ADAPTER], 2, 256)


@pytest.fixture
def no_wrappers() -> Any:
    """Forgets the wrappers of other tests."""
    adapters._HAVE_ADAPTER.clear()
    yield
    adapters._HAVE_ADAPTER.clear()


@pytest.mark.usefixtures("no_wrappers")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_only_a_step_that_is_known_to_have_no_adapter_has_none(kind: Any) -> None:
    assert adapters.may_be_active()
    wrapper = make_wrapper(kind)
    assert adapters.may_be_active()
    for requests, expected in (((0, 0), False), ((0, ADAPTER), True), ((ADAPTER,), True),
                               ((0,), False)):  # fmt: skip
        update(wrapper, *requests)
        assert adapters.may_be_active() == expected
        assert wrapper.token_lora_indices.tolist() == [  # the LoRA layers are told as well
            0 if request else -1 for request in requests for _ in range(2)
        ]


@pytest.mark.usefixtures("no_wrappers")
def test_an_adapter_of_any_wrapper_counts() -> None:
    language, tower = (make_wrapper(AfbsPunicaWrapperCPU) for _ in range(2))
    update(language, 0)
    update(tower, ADAPTER)
    assert adapters.may_be_active()
    update(tower, 0)
    assert not adapters.may_be_active()
    update(tower, ADAPTER)
    del tower  # with its model
    assert not adapters.may_be_active()


@pytest.mark.usefixtures("no_wrappers")
def test_steps_are_sorted_by_what_the_wrappers_say() -> None:
    config = make_config()
    common: Any = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, LENGTH]), max_query_len=LENGTH
    )
    metadata = SimpleNamespace(causal=True)
    wrapper = make_wrapper(AfbsPunicaWrapperCPU)

    def reasons(config: Any) -> dict[str, int]:
        with patch("vllm_afbs.compat.is_plain_causal", return_value=True):
            sorter = StepSorter(config, uniform_profile())
            return dict(sorter.sort(common, torch.tensor([LENGTH]), metadata).dense_reasons)

    assert reasons(config) == {"active_adapter": 1}  # not known
    update(wrapper, 0)
    assert reasons(config) == {}
    update(wrapper, ADAPTER)
    assert reasons(config) == {"active_adapter": 1}
    assert reasons(make_config(lora_config=None)) == {}


def make_config(backend: str = "AFBS", settings: Any = BASE, lora_config: Any = LORA) -> Any:
    return SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=SimpleNamespace(name=backend), backend_per_kind={}
        ),
        additional_config={"afbs": settings},
        lora_config=lora_config,
        speculative_config=None,
    )


@pytest.mark.parametrize(
    ("platform", "wrapper"),
    [("cpu.AfbsCpuPlatform", AfbsPunicaWrapperCPU),
     pytest.param("cuda.AfbsCudaPlatform", AfbsPunicaWrapperGPU, marks=pytest.mark.gpu)],
)  # fmt: skip
def test_vllm_makes_our_wrapper_only_where_steps_are_told_apart(
    platform: str, wrapper: Any
) -> None:
    folder, name = platform.split(".")
    ours = getattr(importlib.import_module(f"vllm_afbs.backends.{folder}.platform"), name)
    (stock,) = ours.__bases__

    def named(config: Any) -> str:
        with patch("vllm.config.vllm._current_vllm_config", config):
            return str(ours.get_punica_wrapper())

    assert named(make_config()) == path_of(wrapper)
    for config in (None, make_config(backend="CPU_ATTN"), make_config(settings={})):
        assert named(config) == stock.get_punica_wrapper()
    assert stock.get_punica_wrapper() in map(path_of, wrapper.__bases__)


def path_of(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def test_steps_are_told_apart_if_lora_is_on_and_the_setting_says_so() -> None:
    assert configuration.tells_adapters_apart(make_config())
    assert not configuration.tells_adapters_apart(make_config(settings={}))
    assert not configuration.tells_adapters_apart(make_config(lora_config=None))
