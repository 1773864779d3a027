"""LoRA: sparse in steps without an adapter that was not validated, vLLM's dense backend in others.

With ``base``, no adapter is.
"""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.worker_manager import WorkerLoRAManager

from tests.hybrid_engines import Run, engine, run_engines
from tests.hybrids import LENGTH
from tests.models import ADAPTER_RANK, save_adapter, save_small_model
from tests.profiles import SMALL_MODEL, of_levels, uniform_profile
from tests.test_hybrids import KEEP_ALL, OURS, PRODUCTS, STOCK, difference
from vllm_afbs.backends import adapters
from vllm_afbs.backends.cpu.adapters import AfbsPunicaWrapperCPU
from vllm_afbs.backends.cuda.adapters import AfbsPunicaWrapperGPU
from vllm_afbs.backends.shared import StepSorter
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.adapters import AdapterLevel, AdapterProfile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.weights import adapter_sha256
from vllm_afbs.serving import configuration

ADAPTER, OTHER = 7, 9
LORA = {
    "enable_lora": True,
    "max_lora_rank": ADAPTER_RANK,
    "max_loras": 1,
    # Otherwise vLLM 0.32 also wraps the logits, and has no prompt's logprobs of two requests.
    "lora_target_modules": ["q_proj", "k_proj", "v_proj"],
}
BASE, VALIDATED = {"lora": "base"}, {"lora": "validated"}
HOLDS = {"kept": True, "sparse": True, "fast": False}
"""The levels, and whether they hold for the adapter that was validated."""
NUM_LAYERS = SMALL_MODEL.num_layers


def with_adapter(adapter: Path) -> Profile:
    """A profile that was validated with an adapter."""
    sparse = uniform_profile(tau=0.5, min_seq_len=256)
    kept = uniform_profile(tau=0.5, min_seq_len=256, theta=KEEP_ALL)
    profile = of_levels({"kept": kept, "sparse": sparse, "fast": sparse}, default="sparse")
    digest = adapter_sha256(adapter)
    assert digest is not None
    levels = [AdapterLevel(kl=0.01, holds=holds) for holds in HOLDS.values()]
    listed = AdapterProfile(name="one", sha256=digest, levels=levels)
    return profile.model_copy(update={"adapters": [listed]})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Engines by name. Each gets the same two prompts, in one step unless the name says turns."""
    folder = tmp_path_factory.mktemp("lora")
    model, adapter = save_small_model(folder / "model"), save_adapter(folder / "adapter", seed=1)
    other = save_adapter(folder / "other", seed=2)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    profile = folder / "profile.json"
    write_atomically(profile, uniform_profile(tau=0.5, min_seq_len=256).to_json())

    def served(given: list[Path | None], settings: Any = BASE, **more: Any) -> Any:
        return engine(model, OURS, profile, given, settings, **LORA | more)

    def stock(given: list[Path | None]) -> Any:
        return engine(model, STOCK, None, given, **LORA)

    validated = folder / "validated.json"
    write_atomically(validated, with_adapter(adapter).to_json())
    both, mixed, none = [adapter, other], [adapter, None], [None, None]
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
        "validated": engine(
            model, OURS, validated, both, VALIDATED, levels=list(HOLDS), **LORA, max_num_seqs=1
        ),
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


def test_an_adapter_runs_sparse_at_the_levels_that_hold_for_it(runs: dict[str, Run]) -> None:
    """And nowhere else; an adapter that the profile does not list runs dense at all levels.

    There is room for one adapter at a time, so each is loaded again at each turn.
    """
    found, stock = runs["validated"], runs["stock, both"]
    turns = {
        level: {**found, "logprobs": found["logprobs"][2 * turn : 2 * turn + 2]}
        for turn, level in enumerate(HOLDS)
    }
    for level in HOLDS:
        assert prompt_difference(turns[level], stock, 1) <= 1e-5  # type: ignore[arg-type]
        sparse = level == "sparse"
        assert (prompt_difference(turns[level], stock, 0) > 1e-3) == sparse  # type: ignore[arg-type]
        if not sparse:
            assert prompt_difference(turns[level], stock, 0) <= 1e-5  # type: ignore[arg-type]
    num_dense = sum(1 if holds else 2 for holds in HOLDS.values())
    assert found["fallbacks"] == {"active_adapter": num_dense * NUM_LAYERS}
    assert num_skipped(found) > 0
    assert "INFO: LoRA adapters that may run sparse: 'one' (kept, sparse)." in found["log"]


WRAPPERS: list[Any] = [
    AfbsPunicaWrapperCPU,
    pytest.param(AfbsPunicaWrapperGPU, marks=pytest.mark.gpu),
]


def make_wrapper(kind: Any, max_loras: int = 1) -> Any:
    device = "cpu" if kind is AfbsPunicaWrapperCPU else "cuda"
    config = SimpleNamespace(max_loras=max_loras, specialize_active_lora=False)
    return kind(64, max_batches=8, device=device, lora_config=config)


def update(wrapper: Any, *requests: int) -> None:
    """Tells a wrapper of a step in which each request has two tokens, as vLLM does."""
    tokens = tuple(request for request in requests for _ in range(2))
    slots = [ADAPTER, OTHER]
    wrapper.update_metadata(LoRAMapping(tokens, requests, is_prefill=True), slots, 3, 256)


@pytest.fixture
def no_wrappers() -> Any:
    """Forgets the wrappers and adapters of other tests."""
    with (
        patch.object(adapters, "_LATEST", WeakKeyDictionary()),
        patch.dict(adapters._DIGESTS, clear=True),
    ):
        yield


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
@pytest.mark.parametrize("kind", WRAPPERS)
def test_adapters_that_were_validated_do_not_count(kind: Any) -> None:
    wrapper = make_wrapper(kind, max_loras=2)
    assert adapters.may_be_active({"a", "b"})
    adapters._DIGESTS.update({ADAPTER: "a", OTHER: None})
    for requests, validated, expected in (
        ((ADAPTER, 0), {"a"}, False),
        ((ADAPTER,), {"b"}, True),
        ((ADAPTER,), set(), True),
        ((ADAPTER, OTHER), {"a"}, True),  # its files are not known
        ((0,), set(), False),
    ):
        update(wrapper, *requests)
        assert adapters.may_be_active(validated) == expected
    update(wrapper, ADAPTER)
    assert not adapters.may_be_active({"a"})
    adapters._DIGESTS[ADAPTER] = "c"  # loaded again, from other files
    assert adapters.may_be_active({"a"})


@pytest.mark.usefixtures("no_wrappers")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_all_rows_of_a_prompts_logits_have_its_adapter(kind: Any) -> None:
    wrapper = make_wrapper(kind)
    update(wrapper, ADAPTER)
    with adapters.one_prompts_logits(5):
        assert wrapper.sampler_indices.tolist() == [0] * 5
        assert wrapper.token_lora_indices.tolist() == [0] * 2
    assert wrapper.sampler_indices.tolist() == [0]
    update(wrapper, 0)
    with adapters.one_prompts_logits(3):
        assert wrapper.sampler_indices.tolist() == [-1] * 3


@pytest.mark.usefixtures("no_wrappers")
def test_files_are_known_by_the_number_that_they_were_loaded_under(tmp_path: Path) -> None:
    one, other = (save_adapter(tmp_path / str(seed), seed) for seed in (1, 2))

    def load(_: Any, request: Any) -> str:
        if request.lora_path == "broken":
            raise ValueError
        return "what vLLM loads"

    with patch.object(WorkerLoRAManager, "_load_adapter", load):
        adapters._note_files()
        adapters._note_files()  # for the next model

        def loaded(path: Path | str, **more: Any) -> str | None:
            request = SimpleNamespace(lora_int_id=ADAPTER, lora_path=str(path), **more)
            assert WorkerLoRAManager._load_adapter(None, request) == "what vLLM loads"  # type: ignore[arg-type,comparison-overlap]
            return adapters._DIGESTS[ADAPTER]

        assert loaded(one) == adapter_sha256(one) is not None
        assert loaded(other) == adapter_sha256(other) != adapter_sha256(one)
        with pytest.raises(ValueError):  # noqa: PT011
            loaded("broken")
        assert {ADAPTER: adapter_sha256(other)} == adapters._DIGESTS
        assert loaded(one, tensorizer_config_dict={}) is None
        assert loaded(tmp_path) is None


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
def test_steps_are_sorted_by_what_the_wrappers_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    config = make_config()
    common: Any = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, LENGTH]), max_query_len=LENGTH
    )
    metadata = SimpleNamespace(causal=True)
    wrapper = make_wrapper(AfbsPunicaWrapperCPU)

    def reasons(config: Any, profile: Profile | None = None) -> dict[str, int]:
        with patch("vllm_afbs.compat.is_plain_causal", return_value=True):
            sorter = StepSorter(config, profile or uniform_profile())
            return dict(sorter.sort(common, torch.tensor([LENGTH]), metadata).dense_reasons)

    assert reasons(config) == {"active_adapter": 1}  # not known
    update(wrapper, 0)
    assert reasons(config) == {}
    update(wrapper, ADAPTER)
    assert reasons(config) == {"active_adapter": 1}
    assert reasons(make_config(lora_config=None)) == {}
    profile = with_adapter(save_adapter(tmp_path / "adapter", seed=1))
    (adapter,) = profile.adapters
    with patch.dict(adapters._DIGESTS, {ADAPTER: adapter.sha256}):
        for level, holds in HOLDS.items():
            expected = {} if holds else {"active_adapter": 1}
            assert reasons(make_config(settings=VALIDATED | {"level": level}), profile) == expected
        assert reasons(make_config(settings=BASE), profile) == {"active_adapter": 1}
        assert reasons(make_config(settings=VALIDATED)) == {"active_adapter": 1}


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
    assert not configuration.serves_adapters(make_config())
    for settings, expected in ((VALIDATED, True), ({}, False)):
        config = make_config(settings=settings)
        assert configuration.tells_adapters_apart(config) == expected
        assert configuration.serves_adapters(config) == expected
    assert not configuration.serves_adapters(make_config(settings=VALIDATED, lora_config=None))
    assert not configuration.tells_adapters_apart(make_config(lora_config=None))
