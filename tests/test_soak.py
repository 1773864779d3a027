"""The soak's own logic: its plan, what the plan must count, and when memory counts as flat."""

import itertools
from collections import Counter

import pytest
import torch

from benchmarks.soak import checks, plan
from benchmarks.soak.checks import FALLBACKS, PRODUCTS, TOKENS
from tests.profiles import uniform_profile
from vllm_afbs.commands.client import Counters
from vllm_afbs.serving.batch import sort_requests

LENGTHS = [1, 2, 127, 128, 1023, 1024, 1500, 4097, 8192]


def test_a_plan_is_the_same_each_time_and_has_all_that_a_soak_needs() -> None:
    waves = plan.make_plan(1100)
    assert waves == plan.make_plan(1100)
    assert waves != plan.make_plan(1100, seed=9)
    requests = [request for wave in waves for request in wave]
    assert len(requests) == 1100
    kinds = Counter(request.kind for request in requests)
    assert all(kinds[kind] >= 20 for kind in plan.Kind.__args__)
    prompts = [each for each in requests if each.kind not in ("malformed", "too_long")]
    assert min(each.num_tokens for each in prompts) == 1
    assert 7168 <= max(each.num_tokens + each.max_tokens for each in prompts) <= plan.MAX_MODEL_LEN
    assert {each.stream for each in prompts if each.kind == "whole"} == {True, False}
    assert all(
        each.num_tokens >= plan.MAX_MODEL_LEN for each in requests if each.kind == "too_long"
    )
    leaving = [any(each.kind == "leave_waiting" for each in wave) for wave in waves]
    assert leaving == [False, True] * 5 + [False]
    # The longest never meet, whatever order the clients get to them.
    longest = [sum(each.num_tokens >= 7168 for each in wave) for wave in map(_prompts, waves)]
    assert max(longest) == 1


def test_the_first_wave_writes_to_the_whole_cache() -> None:
    model = uniform_profile().model
    token_bytes = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim
    for num_tokens in (1, 2048, 2049, 50_000):
        wave = plan.fill(num_tokens * token_bytes, model)
        written = sum(each.num_tokens for each in wave)
        assert num_tokens <= written < num_tokens + plan.FILL_TOKENS
        assert all(0 <= each.where < 1 for each in wave)


def test_the_largest_step_is_that_of_a_waves_longest_prompts() -> None:
    def wave(*lengths: int) -> list[plan.Request]:
        refused = plan.Request("too_long", 9000, 1, stream=False, where=0.0)
        return [refused, *(plan.Request("whole", n, 1, stream=False, where=0.0) for n in lengths)]

    assert plan.most_tokens_at_once([wave(5, 90, 7, 80), wave(100, 1, 2, 3)], num_clients=2) == 172


def _prompts(wave: list[plan.Request]) -> list[plan.Request]:
    return [each for each in wave if each.kind != "too_long"]


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_expected_totals_are_what_the_backend_makes_of_a_step(sparsity: float) -> None:
    """All prompts in one step, as the backend sorts and cuts it."""
    profile = uniform_profile(sparsity=sparsity)
    num_layers, num_heads = profile.model.num_layers, profile.model.num_heads
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    step = sort_requests(starts, torch.tensor(LENGTHS, dtype=torch.int32), profile)
    found = checks.expect(LENGTHS, profile)
    assert found.tokens == num_layers * (step.num_dense_tokens + step.num_long_tokens)
    assert found.products == (2 * num_heads * step.num_visible,) * num_layers
    expected = Counter({reason: n * num_layers for reason, n in step.dense_reasons.items()})
    if sparsity:
        assert found.long_tokens == num_layers * step.num_long_tokens
    else:
        assert found.long_tokens == 0
        expected["profile_dense"] = num_layers * len(step.long_prefills)
    assert found.fallbacks == expected


def test_visible_blocks_are_those_that_some_row_sees() -> None:
    for length in (1, 5, 8, 9, 30):
        seen = {(row // 8, key // 4) for row in range(length) for key in range(row + 1)}
        assert checks.visible_blocks(length, 8, 4) == len(seen)


def _counters(**changes: float) -> Counters:
    """What a server of two layers counts for a prompt of 1024 and one of 100 tokens."""
    values = {"sparse": 2048.0, "dense": 200.0, "computed": 200.0, "skipped": 88.0, "short": 2.0}
    others = changes.keys() - values
    values |= changes
    layers = [{"layer": "0"}, {"layer": "1"}]
    labelled = [(TOKENS, {"path": path}, values[path]) for path in ("sparse", "dense")]
    labelled += [
        (PRODUCTS, {**layer, "outcome": outcome}, values[outcome])
        for layer in layers
        for outcome in ("computed", "skipped")
    ]
    labelled.append((FALLBACKS, {"reason": "short_query"}, values["short"]))
    labelled += [(FALLBACKS, {"reason": name}, changes[name]) for name in others]
    return {(name, frozenset(labels.items())): value for name, labels, value in labelled}


def test_counts_hold_or_are_named() -> None:
    profile = uniform_profile()
    exact = checks.expect([1024, 100], profile)
    assert checks.count_faults(_counters(), exact, exact) == []
    more = checks.expect([1024, 100, 90], profile)
    assert checks.count_faults(_counters(), exact, more) == []
    assert checks.count_faults(_counters(), more, more) == [
        "prefill tokens: 2428 expected, 2248 counted",
        "fallbacks, short_query: 4 expected, 2 counted",
    ]
    assert checks.count_faults(_counters(skipped=87.0), exact, exact) == [
        "block products of layer 0: 288 expected, 287 counted",
        "block products of layer 1: 288 expected, 287 counted",
    ]
    assert checks.count_faults(_counters(short=5.0), exact, more) == [
        "fallbacks, short_query: 2 to 4 expected, 5 counted"
    ]
    assert checks.count_faults(_counters(lora=1.0), exact, exact) == [
        "fallbacks, lora: 0 expected, 1 counted"
    ]
    moved = {"sparse": 1024.0, "dense": 1224.0}
    assert checks.count_faults(_counters(**moved), exact, exact) == [
        "sparse tokens: 2048 expected, 1024 counted"
    ]
    assert checks.count_faults(_counters(**moved, dense_is_faster=1.0), exact, exact) == []


def test_memory_may_rise_at_first_but_not_go_on() -> None:
    warm_up = [1.0, 2.0, 3.0]
    assert checks.memory_faults([*warm_up, *[4.0, 4.1, 4.0] * 2]) == []
    assert checks.memory_faults([*warm_up, *[4.0] * 3, 4.0, 9.0, 4.0]) == []
    assert checks.memory_faults([*warm_up, *[4.0] * 3, *[4.2] * 3]) == [
        "memory: grew by 5.0% in the last third, 2% allowed"
    ]
    leak = [100 + second for second in range(900)]
    assert len(checks.memory_faults(leak)) == 1
    with pytest.raises(ValueError, match="at least 3 samples expected, got 2"):
        checks.growth_ratio([1.0, 1.0])
