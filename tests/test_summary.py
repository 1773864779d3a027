"""What a server logs about its layers, once: the dense ones by reason, and one line for all."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.layers import make_impl, make_layer
from tests.profiles import of_levels, uniform_profile
from tests.test_fail_closed import PAGE_SIZE, make_config, name_of
from vllm_afbs import compat
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, configuration
from vllm_afbs.serving.plan import plan_layer, plan_layers
from vllm_afbs.serving.summary import Summary, report

UNIFORM = uniform_profile()
WHOLE = "2 of 2 layers sparse from 1,024 to 8,192 tokens"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Where the worker is; a test may change it."""
    where = SimpleNamespace(rank=0, stage=(0, 1))
    monkeypatch.setattr(compat, "tensor_parallel_rank", lambda: where.rank)
    monkeypatch.setattr(compat, "tensor_parallel_size", lambda: 1)
    monkeypatch.setattr(compat, "pipeline_stage", lambda: where.stage)
    return where


def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """The configuration of a worker with two layers, each with a cache and of our backend."""
    layers = {name_of(index): make_layer(make_impl("cpu")) for index in range(2)}
    settings = {
        "model_config": SimpleNamespace(
            enable_sleep_mode=False, max_model_len=8192, get_num_layers=lambda parallel: 2
        ),
        "parallel_config": SimpleNamespace(data_parallel_rank_local=None),
        "scheduler_config": SimpleNamespace(
            max_num_batched_tokens=2048, long_prefill_token_threshold=0
        ),
    }
    config = make_config(tmp_path, layers, **settings | changes)
    monkeypatch.setattr(compat, "is_ours", lambda layer: True)
    monkeypatch.setattr(compat, "cache_specs", lambda config: dict.fromkeys(layers))
    return config


def build(config: Any, *layers: int | str) -> None:
    """What a metadata builder does for its layers, given by index or by name."""
    names = [name_of(layer) if isinstance(layer, int) else layer for layer in layers]
    profile = admission.admitted_profile(config)
    final = [plan for _, (plan,) in plan_layers(config, profile, names, PAGE_SIZE)]
    report(config, profile, names, final)


def test_several_builders_give_one_line(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config = model(tmp_path, monkeypatch)
    build(config, 1)
    assert logged == []
    build(config, 0)
    assert logged == [f"{WHOLE}."]
    # vLLM makes builders again after it has profiled the memory, and one for each microbatch.
    for index in (0, 1, 0):
        build(config, index)
    assert logged == [f"{WHOLE}."]


def test_dense_layers_are_logged_by_reason_once_for_all_microbatches(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config = model(tmp_path, monkeypatch)
    layers = config.compilation_config.static_forward_context
    layers |= {name: make_layer(make_impl("cpu")) for name in ("a", "b")}
    layers[name_of(0)].impl.alibi_slopes = [1.0]
    expected = [
        f"1 layers run dense: alibi ({name_of(0)} to {name_of(0)}).",
        "2 layers run dense: unknown_layer (a to b).",
        f"1 of 4{WHOLE.removeprefix('2 of 2')}; 3 dense: 2 unknown_layer, 1 alibi.",
    ]
    for _ in range(2):  # --enable-dbo: a builder for each microbatch
        build(config, *layers)
        assert logged == expected
    layers["a"].impl.alibi_slopes = [1.0]  # comes after the reason that it had
    layers[name_of(1)].impl.alibi_slopes = [1.0]
    build(config, *layers)
    assert logged[3:] == [
        f"1 layers run dense: alibi ({name_of(1)} to {name_of(1)}).",
        "0 of 4 layers sparse; 4 dense: 2 alibi, 2 unknown_layer.",
    ]


def test_layers_that_are_planned_otherwise_later_are_said_again(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config = model(tmp_path, monkeypatch)
    build(config, 0, 1)
    config.lora_config = SimpleNamespace()
    build(config, 0, 1)
    assert logged[-1] == "0 of 2 layers sparse; 2 dense: lora."
    assert logged[0] == f"{WHOLE}."


def test_a_layer_without_a_cache_is_not_waited_for(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config = model(tmp_path, monkeypatch)
    monkeypatch.setattr(compat, "cache_specs", lambda config: {name_of(0): None})
    monkeypatch.setattr(configuration, "num_decoder_layers", lambda config: 1)
    build(config, 0)
    assert logged == ["1 of 1 layers sparse from 1,024 to 8,192 tokens."]


@pytest.mark.parametrize(("rank", "data_parallel_rank"), [(0, 1), (1, 0), (1, None)])
def test_other_ranks_say_nothing(
    rank: int, data_parallel_rank: int | None, place: SimpleNamespace, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, logged: list[str],
) -> None:  # fmt: skip
    parallel = SimpleNamespace(data_parallel_rank_local=data_parallel_rank)
    changes: dict[str, Any] = {"parallel_config": parallel, "additional_config": {}}
    place.rank = rank
    build(model(tmp_path, monkeypatch, **changes), 0, 1)
    assert logged == []
    place.rank, parallel.data_parallel_rank_local = 0, 0
    build(model(tmp_path, monkeypatch, **changes), 0, 1)
    assert logged == ["0 of 2 layers sparse; 2 dense: no_profile."]


def test_a_pipeline_stage_speaks_for_its_layers(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    place.stage = (1, 4)
    build(model(tmp_path, monkeypatch), 0, 1)
    assert logged == [f"Pipeline stage 2 of 4: {WHOLE}."]


def summary(
    reasons: list[Any],
    max_model_len: int = 9000,
    chunk: int = 2048,
    num_layers: int = 0,
    profile: Profile = UNIFORM,
    settings: Any = None,
) -> Summary:
    layers = num_layers or len(reasons)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=max_model_len, get_num_layers=lambda parallel: layers
        ),
        additional_config={"afbs": settings or {}},
        parallel_config=None,
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=chunk, long_prefill_token_threshold=0
        ),
    )
    plans = [plan_layer(profile, 0, 4, 0, reason) for reason in reasons]
    return Summary.of(config, profile, plans)


def test_the_line_counts_by_reason_and_cuts_the_lengths() -> None:
    one = summary([None] * 3 + ["alibi"])
    assert str(one) == "3 of 4 layers sparse from 1,024 to 8,192 tokens; 1 dense: alibi"
    two = summary([None, "page_size", "alibi", "alibi"], max_model_len=4000)
    expected = "1 of 4 layers sparse from 1,024 to 4,000 tokens; 3 dense: 2 alibi, 1 page_size"
    assert str(two) == expected


def test_the_line_names_the_level_where_there_are_several() -> None:
    by_name = {"exact": uniform_profile(), "fast": uniform_profile(tau=0.5)}
    profile = of_levels(by_name, default="exact")
    assert str(summary([None], profile=profile)) == (
        "1 of 1 layers sparse at level exact from 1,024 to 8,192 tokens"
    )
    fast = summary([None], profile=profile, settings={"level": "fast"})
    assert "sparse at level fast from" in str(fast)


def test_layers_without_full_attention_are_counted_apart() -> None:
    window = summary([None, "local_attention", "local_attention"])
    assert window.dense == Counter()
    assert str(window) == (
        "1 of 1 layers sparse from 1,024 to 8,192 tokens; 2 others have no full attention"
    )
    # Layers of Mamba are none of vLLM's attention layers, and a drafter's are none of the model's.
    mamba = summary([None, "alibi", "unknown_layer"], num_layers=12)
    assert str(mamba).endswith(
        "; 2 dense: 1 alibi, 1 unknown_layer; 10 others have no full attention"
    )


def test_a_server_that_accepts_no_long_prompt_is_off() -> None:
    short = summary([None, "alibi"], max_model_len=1000)
    assert (short.num_sparse, short.dense) == (0, Counter(short_context=1, alibi=1))
    assert str(short).endswith("(max_model_len is 1,000, the shortest calibrated context 1,024)")
    chunks = summary([None], chunk=100)
    assert (chunks.num_sparse, chunks.dense) == (0, Counter(short_query=1))
    assert "at most 100 tokens" in str(chunks)
