"""Dividing a budget among layers, against every possible division and a model run in fp64."""

import itertools
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.profiles import SMALL_MODEL, one_level, uniform_profile
from tests.tuning_jobs import command, start, wait_for
from vllm_afbs import tune
from vllm_afbs.kernels import THETA_OFF, BlockGeometry, HeadThresholds
from vllm_afbs.kernels.reference import reference_attention, reference_select
from vllm_afbs.models.in_process.engine import EndToEnd, Predictions
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import HeadProfile, LayerLevel, Measurement
from vllm_afbs.profile.tuner_run import WholeModel
from vllm_afbs.serving.plan import plan_layer
from vllm_afbs.tuning.allocation.division import Choices
from vllm_afbs.tuning.allocation.goal import OPTIONS, Goal, GoalKind, Measured
from vllm_afbs.tuning.allocation.model_runs import mean_sparsity, served_thresholds

ROUNDING = 1e-9


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """Some layers whose density falls, and whose damage grows, from choice to choice."""
    num_layers, num_choices = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shares = st.lists(st.floats(0.0, 1.0), min_size=num_choices, max_size=num_choices)
    density = [sorted(draw(shares), reverse=True) for _ in range(num_layers)]
    damage = [sorted(draw(shares)) for _ in range(num_layers)]
    return Choices(
        torch.tensor(density, dtype=torch.float64), torch.tensor(damage, dtype=torch.float64)
    )


def every_allocation(of: Choices) -> list[tuple[float, float]]:
    """Mean density and damage of every combination of choices."""
    num_layers, num_choices = of.work.shape
    return [
        (of.mean_work(chosen), of.total_damage(chosen))
        for each in itertools.product(range(num_choices), repeat=num_layers)
        for chosen in [torch.tensor(each)]
    ]


@settings(max_examples=60, deadline=None)
@given(choices(), st.floats(0.0, 4.0))
def test_no_allocation_of_as_little_damage_is_sparser(of: Choices, limit: float) -> None:
    chosen = of.within_damage(limit)
    density, damage = of.mean_work(chosen), of.total_damage(chosen)
    allocations = every_allocation(of)
    assert damage <= limit + ROUNDING or damage <= min(d for _, d in allocations) + ROUNDING
    for other_density, other_damage in allocations:
        if other_damage <= damage:
            assert other_density >= density - 1e-6


@settings(max_examples=60, deadline=None)
@given(choices(), st.floats(0.0, 1.0))
def test_no_allocation_of_as_little_work_does_less_damage(of: Choices, limit: float) -> None:
    chosen = of.within_work(limit)
    density, damage = of.mean_work(chosen), of.total_damage(chosen)
    allocations = every_allocation(of)
    assert density <= limit + ROUNDING or density <= min(d for d, _ in allocations) + ROUNDING
    for other_density, other_damage in allocations:
        if other_density <= density:
            assert other_damage >= damage - 1e-6


def test_predictions_know_their_loss_and_divergence() -> None:
    one, other = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    dense, sparse = (Predictions(each.log(), torch.tensor([1])) for each in (one, other))
    assert dense.loss == pytest.approx(math.log(4))
    assert sparse.loss == pytest.approx(math.log(2))
    assert dense.kl_to(sparse) == pytest.approx(0.25 * math.log(2))
    assert dense.kl_to(dense) == 0.0


def measured(
    sparsity: float = 0.5, kl: float = 0.0, grown: float = 1.0, time_ratio: float = 0.5
) -> Measured:
    whole = WholeModel(sparsity=sparsity, kl=kl, perplexity=10 * grown, dense_perplexity=10)
    return Measured(whole, time_ratio)


def test_a_lucky_perplexity_does_not_hide_a_divergence() -> None:
    goal = Goal("perplexity", 0.01)
    assert goal.reached(measured(grown=0.99, kl=0.0)) == 0.0
    assert goal.reached(measured(grown=0.99, kl=0.02)) == pytest.approx(math.expm1(0.02))
    assert goal.reached(measured(grown=1.05, kl=0.02)) == pytest.approx(0.05)
    assert not goal.allows(goal.reached(measured(grown=0.99, kl=0.02)))


@given(st.floats(1e-4, 1.0), st.floats(1e-6, 1.0))
def test_a_budget_moves_against_its_miss(budget: float, reached: float) -> None:
    goal = Goal("perplexity", 0.01)
    moved = goal.next_budget(budget, reached)
    assert (moved < budget) == (reached > math.expm1(0.9 * math.log1p(0.01)))
    assert 0.2 * budget <= moved * (1 + ROUNDING) <= 5 * budget * (1 + 2 * ROUNDING)
    sparsity = Goal("sparsity", 0.5)
    assert (sparsity.next_budget(0.5, reached) > 0.5) == (reached < 0.505)
    speedup = Goal("speedup", 2.0)
    # Its budget is a time ratio: too slow a model gets less time.
    assert (speedup.next_budget(0.495, 1.0 + reached) < 0.495) == (1.0 + reached < 2.0 / 0.99)
    kl = Goal("kl", 0.01)
    assert (kl.next_budget(budget, reached) < budget) == (reached > 0.009)


@pytest.mark.parametrize(
    ("goal", "value", "within", "beyond"),
    [
        ("sparsity", 0.5, measured(sparsity=0.505), measured(sparsity=0.49)),
        ("speedup", 2.0, measured(time_ratio=0.495), measured(time_ratio=0.51)),
        ("perplexity", 0.01, measured(grown=1.009), measured(grown=1.011)),
        ("kl", 0.01, measured(kl=0.009), measured(kl=0.011)),
    ],
)
def test_goals_say_what_they_reach_and_prefer(
    goal: GoalKind, value: float, within: Measured, beyond: Measured
) -> None:
    asked = Goal(goal, value)
    assert asked.allows(asked.reached(within))
    assert asked.is_met_closely(asked.reached(within))
    assert not asked.allows(asked.reached(beyond))
    assert OPTIONS[goal] in asked.missed([asked.reached(beyond)])
    exact, fast = measured(kl=0.001, time_ratio=0.5), measured(kl=0.002, time_ratio=0.4)
    assert asked.prefers(exact, fast) == asked.wants_speed
    assert asked.prefers(fast, exact) == (not asked.wants_speed)


def test_a_model_run_sparse_is_the_specification_layer_by_layer(tiny_model: Path) -> None:
    """With its attention replaced by the specification's, in fp64, a model predicts the same."""
    from transformers import AttentionInterface

    model = open_model(str(tiny_model))
    shape, block = model.fingerprint, 16
    tokens = [(5 * i) % 60 for i in range(100)]
    thresholds = {
        1: HeadThresholds(
            torch.full((shape.num_heads,), 0.6), torch.full((shape.num_heads,), THETA_OFF)
        )
    }
    runner = EndToEnd(model, block, block)
    dense, sparse = runner.predict(tokens, {}), runner.predict(tokens, thresholds)
    assert torch.equal(runner.predict(tokens, {}).log_probs, dense.log_probs)

    def specified(module, query, key, value, mask, scaling=None, **_):  # type: ignore[no-untyped-def]
        geometry = BlockGeometry(len(tokens), len(tokens), block, block)
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        everything = geometry.visible.expand(shape.num_heads, -1, -1)
        keep = everything
        if module.layer_idx in thresholds:
            keep = reference_select(q, k, thresholds[module.layer_idx], geometry, scaling)
            assert keep.sum() < 0.9 * everything.sum()
        output, _ = reference_attention(q, k, v, keep, geometry, scaling)
        return output[None].to(query.dtype), None

    AttentionInterface.register("afbs_specified", specified)
    runner._model.config._attn_implementation = "afbs_specified"
    expected = runner.predict(tokens, thresholds)
    assert dense.kl_to(sparse) > 1e-6
    torch.testing.assert_close(sparse.log_probs, expected.log_probs, atol=2e-5, rtol=1e-4)


def test_layers_that_the_server_leaves_dense_count_as_dense() -> None:
    sparse, dense = (Measurement(length=128, error=0.01, sparsity=each) for each in (0.6, 0.0))
    lone = [HeadProfile(tau=0.5, theta=-1.0, calibration=[sparse], validation=sparse)]
    lone += [HeadProfile(tau=1.0, theta=-1.0, calibration=[dense], validation=dense)] * 7
    layers = {0: LayerLevel(heads=lone), 1: LayerLevel(heads=lone[:1] * 8)}
    model = SMALL_MODEL.model_copy(update={"num_heads": 8})
    profile = uniform_profile(model).model_copy(
        update={"layers": [one_level(each.heads) for each in layers.values()]}
    )
    served = {
        index: plan.thresholds
        for index in layers
        for plan in [plan_layer(profile, index, 8, 0, None)]
        if plan.thresholds is not None
    }
    assert served_thresholds(layers).keys() == served.keys() == {1}
    assert mean_sparsity(layers) == pytest.approx(0.6 / 2)


GOAL = ["--target-sparsity", "0.25"]


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job with a goal that was killed while layers' damage was measured."""
    output = tmp_path_factory.mktemp("killed") / "profile.json"
    job = start(command(tiny_model, output, *GOAL))
    wait_for(job, output, lambda journal: b"damage of layers 0" in journal)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not output.exists()
    return output


def resumed(killed: Path, output: Path, model: Path, *more: str) -> int:
    """Goes on with a copy of the killed job."""
    shutil.copytree(f"{killed}.work", f"{output}.work")
    return tune.main(command(model, output, "--resume", *more))


def test_a_goal_divides_the_error_among_layers(
    killed: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "profile.json"
    assert resumed(killed, output, tiny_model, *GOAL) == 0
    profile = load_profile(output)
    budget = profile.tuner.budget
    assert budget is not None
    assert (budget.goal, budget.target) == ("sparsity", 0.25)
    assert profile.default_level == "goal"
    goal = profile.level_index()
    held_out = [head.validation for head in profile.heads_of(goal)]
    mean = sum(each.sparsity for each in held_out if each is not None) / len(held_out)
    assert mean == pytest.approx(budget.allocated.sparsity)
    assert profile.levels[goal].whole_model == budget.allocated
    assert budget.allocated.sparsity >= 0.25
    assert budget.allocated.kl > 0.0
    for level in range(len(profile.levels)):
        for index, layer in enumerate(profile.layers):
            assert layer.levels[level].tolerance == profile.tolerance_of(index, level)
    for slower, faster in itertools.pairwise(profile.levels):
        assert slower.whole_model is not None
        assert faster.whole_model is not None
        assert slower.whole_model.kl < faster.whole_model.kl
        ratios = [each.by_length[-1].attention_time_ratio for each in (slower, faster)]
        assert ratios[0] > ratios[1]  # type: ignore[operator]
    assert "Tolerance by layer" in output.with_suffix(".html").read_text(encoding="utf-8")


def test_what_was_tuned_serves_another_goal_and_none(
    killed: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, impossible = tmp_path / "plain.json", tmp_path / "impossible.json"
    assert resumed(killed, plain, tiny_model) == 0
    assert load_profile(plain).tuner.budget is None
    # The diagonal and the first block alone are more than a hundredth.
    assert resumed(killed, impossible, tiny_model, "--target-sparsity", "0.99") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--target-sparsity: 0.99 expected, " in error
    assert not impossible.exists()
    assert Path(f"{impossible}.work").exists()  # for an easier goal
    layers = ["--resume", *GOAL, "--layers", "0"]
    assert tune.main(command(tiny_model, impossible, *layers)) == 2
    assert "--layers: all layers expected" in capsys.readouterr().err
