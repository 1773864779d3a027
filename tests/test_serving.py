"""What a layer and a step serve, without a server."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.profiles import of_levels, one_level, uniform_profile
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, settings
from vllm_afbs.serving.batch import sort_requests
from vllm_afbs.serving.plan import plan_layer


def test_requests_are_sorted_by_what_the_profile_covers() -> None:
    # decode, short chunk, short context, long prefill, beyond the calibrated range
    q_lens = torch.tensor([1, 100, 500, 2000, 300])
    seq_lens = torch.tensor([3000, 4000, 500, 2500, 9000], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), q_lens.cumsum(0)])
    step = sort_requests(starts, seq_lens, uniform_profile())
    assert step.dense_indices == [0, 1, 2, 4]
    assert dict(step.dense_reasons) == {"short_query": 1, "short_context": 1, "long_context": 1}
    assert step.num_dense_tokens == 100 + 500 + 300
    assert step.num_long_tokens == 2000
    (request,) = step.long_prefills
    assert request.rows == slice(601, 2601)
    assert (request.geometry.q_len, request.geometry.kv_len) == (2000, 2500)
    assert request.table_row == 3


def test_without_a_profile_prefills_are_dense_and_decodes_are_no_prefill() -> None:
    starts, seq_lens = torch.tensor([0, 1, 3]), torch.tensor([9, 9])
    step = sort_requests(starts, seq_lens, None)
    assert dict(step.dense_reasons) == {"no_profile": 1}
    assert not sort_requests(starts[:2], seq_lens[:1], None).has_prefill


@pytest.mark.parametrize("profile", [None, uniform_profile()], ids=["no-profile", "profile"])
def test_switched_off_every_prefill_is_dense(profile: Profile | None) -> None:
    starts = torch.tensor([0, 1, 101, 2101])  # decode, short chunk, long prefill
    seq_lens = torch.tensor([3000, 4000, 2500])
    step = sort_requests(starts, seq_lens, profile, enabled=False)
    assert step.dense_indices == [0, 1, 2]
    assert not step.long_prefills
    assert dict(step.dense_reasons) == {"disabled": 2}
    assert step.num_dense_tokens == 2100


def test_a_request_that_only_pads_the_batch_is_left_out() -> None:
    step = sort_requests(torch.tensor([0, 9, 9]), torch.tensor([9, 0]), uniform_profile())
    assert step.dense_indices == [0]


@pytest.mark.parametrize(
    ("tau", "sparsity", "unsupported", "reason"),
    [
        (0.9, 0.5, None, None),
        (0.9, 0.05, None, "profile_dense"),
        (1.0, 0.5, None, "profile_dense"),
        (0.9, 0.5, "alibi", "alibi"),
    ],
)
def test_a_layer_runs_dense_with_its_reason(
    tau: float, sparsity: float, unsupported: str | None, reason: str | None
) -> None:
    profile = uniform_profile(tau=tau, sparsity=sparsity)
    plan = plan_layer(profile, 1, 2, 1, unsupported)
    assert plan.dense_reason == reason
    assert (plan.thresholds is None) == (reason is not None)


def test_a_rank_takes_its_heads() -> None:
    profile = uniform_profile()
    heads = [
        head.model_copy(update={"theta": index / 10})
        for index, head in enumerate(profile.layers[0].levels[0].heads)
    ]
    layers = [one_level(heads), profile.layers[1]]
    profile = profile.model_copy(update={"layers": layers})
    plan = plan_layer(profile, 0, 2, 1, None)
    assert plan.thresholds is not None
    torch.testing.assert_close(plan.thresholds.theta, torch.tensor([0.2, 0.3]))
    assert list(plan.heads) == [2, 3]


def test_a_layer_has_a_plan_for_each_level() -> None:
    """Thresholds, heads of the rank, and whether it is sparse are the level's."""
    by_name = {
        "exact": uniform_profile(tau=1.0, sparsity=0.0),
        "middle": uniform_profile(tau=0.8, sparsity=0.3),
        "fast": uniform_profile(tau=0.5, sparsity=0.6),
    }
    profile = of_levels(by_name, default="middle")
    for level, alone in enumerate(by_name.values()):
        one, other = plan_layer(profile, 1, 2, 1, None, level), plan_layer(alone, 1, 2, 1, None)
        assert (one.dense_reason, one.calibration) == (other.dense_reason, other.calibration)
        assert one.heads == other.heads == range(2, 4)
        assert (one.thresholds is None) == (other.thresholds is None) == (level == 0)
        if one.thresholds is not None and other.thresholds is not None:
            torch.testing.assert_close(one.thresholds.tau, other.thresholds.tau)
    default = plan_layer(profile, 1, 2, 1, None)
    assert default.expected_sparsity(8192) == pytest.approx(0.3)


def _config(**additional: Any) -> Any:
    return SimpleNamespace(additional_config=additional)


def test_additional_config_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.PROFILE_VARIABLE, "environment.json")
    assert settings.configured_profile(_config()) == "environment.json"
    assert settings.configured_profile(_config(afbs={"profile": "c.json"})) == "c.json"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ("c.json", "afbs: "),
        ({"profil": "c.json"}, "afbs.profil: "),
        ({"profile": 3}, "afbs.profile: "),
        ({"per_head_metrics": "yes"}, "afbs.per_head_metrics: "),
        ({"sample_rate": 1.5}, "afbs.sample_rate: "),
        ({"lora": "all"}, "afbs.lora: Input should be 'base' or 'validated'"),
        ({"lora": True}, "afbs.lora: Input should be 'base' or 'validated'"),
        ({"sample_rate": float("nan")}, "afbs.sample_rate: "),
    ],
)
def test_malformed_additional_config_is_refused(given: Any, field: str) -> None:
    with pytest.raises(ProfileError, match=f"^--additional-config: {field}"):
        settings.read_settings(_config(afbs=given))


def test_a_profile_swapped_after_start_up_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "p.json"
    write_atomically(path, uniform_profile().to_json())
    config = _config(afbs={"profile": str(path), "profile_id": uniform_profile().profile_id})
    assert admission.admitted_profile(config) == uniform_profile()
    admission._admitted.cache_clear()
    write_atomically(path, uniform_profile(tau=0.8).to_json())
    with pytest.raises(ProfileError, match="the file now holds"):
        admission.admitted_profile(config)
