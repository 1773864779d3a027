"""Accepting an increase of perplexity: the windows, the bound, its candidates and whole jobs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.tuning_jobs import command
from vllm_afbs import tune
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.errors import InputError
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.engine import EndToEnd, Predictions
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import HeadProfile, LayerLevel, Measurement
from vllm_afbs.profile.tuner_run import Acceptance, BudgetRun, TextPart, WholeModel
from vllm_afbs.tuning.allocation.acceptance import CANDIDATES, AcceptanceTest, increase_of
from vllm_afbs.tuning.allocation.analytic import FACTORS
from vllm_afbs.tuning.allocation.goal import Goal
from vllm_afbs.tuning.allocation.levels import LevelSearch, Windows
from vllm_afbs.tuning.allocation.model_runs import ModelRuns
from vllm_afbs.tuning.allocation.student import t_quantile
from vllm_afbs.tuning.cost import AttentionTime
from vllm_afbs.tuning.engine import Compared
from vllm_afbs.tuning.journal import FILE_NAME, Journal
from vllm_afbs.tuning.search.curve import Curve
from vllm_afbs.tuning.search.results import HeldOut, LayerCurves
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.windows import Part, cut_tokens

PER_CANDIDATE = 0.05 / 3


@given(st.floats(0.5, 0.999), st.integers(1, 200))
def test_quantiles_are_students(probability: float, freedom: int) -> None:
    expected = stats.t.ppf(probability, freedom)
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def scipy_bound(dense: Sequence[float], sparse: Sequence[float]) -> float:
    """SciPy's one-sided bound of paired differences, as an increase of perplexity."""
    test = stats.ttest_rel(sparse, dense, alternative="less")
    return math.expm1(test.confidence_interval(1 - PER_CANDIDATE).high)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(-0.5, 0.5)), min_size=2, max_size=20))
def test_the_bound_is_that_of_paired_differences(pairs: list[tuple[float, float]]) -> None:
    dense = [loss for loss, _ in pairs]
    sparse = [loss + more for loss, more in pairs]
    found = increase_of(dense, sparse)
    mean = np.exp(np.mean(np.subtract(sparse, dense))) - 1
    assert found.measured == pytest.approx(mean, rel=1e-9, abs=1e-12)
    if np.std(np.subtract(sparse, dense)) > 1e-9:
        assert found.bound == pytest.approx(scipy_bound(dense, sparse), rel=1e-6, abs=1e-9)
    assert found.bound >= found.measured


def test_three_candidates_together_are_wrong_once_in_twenty_at_most() -> None:
    """Three candidates that are all slightly too bad, on the same windows, independent noise."""
    rng, wrong, trials = np.random.default_rng(3), 0, 2000
    for _ in range(trials):
        dense = rng.normal(3.0, 1.0, 8)
        bounds = [
            increase_of(dense.tolist(), (dense + rng.normal(0.01, 0.02, 8)).tolist()).bound
            for _ in range(CANDIDATES)
        ]
        wrong += min(bounds) < math.expm1(0.01)
    assert 0.03 < wrong / trials < 0.06


@given(
    sizes=st.lists(st.integers(50, 400), min_size=1, max_size=5),
    length=st.integers(3, 40),
    prefix=st.sampled_from([[], [-1]]),
)
def test_acceptance_windows_share_no_token_with_any_other(
    sizes: list[int], length: int, prefix: list[int]
) -> None:
    tokens = [[1000 * index + position for position in range(n)] for index, n in enumerate(sizes)]
    names = [f"text {index}" for index in range(len(sizes))]
    try:
        cut = cut_tokens(tokens, names, prefix, length, accepting=True)
    except InputError:
        return  # too short a text
    plain = cut_tokens(tokens, names, prefix, length)
    assert cut.windows == plain.windows  # a job goes on with another goal
    assert plain.acceptance == []
    seen = {token for window in cut.windows.values() for token in window[len(prefix) :]}
    for part in cut.acceptance:
        text = tokens[names.index(part.text)]
        assert part.tokens == [*prefix, *text[part.start : part.start + part.num_tokens]]
        assert len(part.tokens) == length
        assert not seen & set(part.tokens[len(prefix) :])
        seen |= set(part.tokens[len(prefix) :])
    counts = {sum(part.text == name for part in cut.acceptance) for name in names}
    assert len(counts) == 1
    assert len(cut.acceptance) >= 2
    assert len(cut.acceptance) < 6 + len(sizes)


@pytest.mark.parametrize("num_texts", [1, 3])
def test_a_text_of_the_length_that_is_asked_for_is_enough(num_texts: int) -> None:
    def cut(size: int) -> list[Part]:
        texts, names = [list(range(size))] * num_texts, [f"{i}.txt" for i in range(num_texts)]
        return cut_tokens(texts, names, [], 30, accepting=True).acceptance

    with pytest.raises(InputError) as refused:
        cut(60)
    line = str(refused.value)
    assert line.startswith("0.txt: the calibration text has 60 tokens, ")
    assert "expected for --max-perplexity-increase" in line
    needed = int(line.split("tokens, ")[1].split()[0])
    assert len(cut(needed)) >= 2
    with pytest.raises(InputError):
        cut(needed - 4)  # the gaps are rounded


class Quiet:
    """Progress that nobody watches."""

    def begin(self, stage: str, total: int) -> None:
        pass

    def advance(self, units: float) -> None:
        pass


class Swinging:
    """A model whose damage is its layers' tolerances squared, and differs by acceptance window.

    Thresholds carry the tolerance: tau is 1 less it.

    Args:
        swing: On every other window, damage is larger by this factor, and smaller on the others.
    """

    def __init__(self, swing: float) -> None:
        self._swing = swing

    def damage(self, thresholds: Mapping[int, HeadThresholds]) -> float:
        return sum(float((1 - each.tau[0]) ** 2) for each in thresholds.values())

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        # Two tokens that are equally likely when dense: the loss grows by the KL divergence.
        spread = math.sqrt(1 - math.exp(-2 * self.damage(thresholds))) / 2
        log_probs = torch.tensor([[0.5 + spread, 0.5 - spread]] * 2, dtype=torch.float64).log()
        sparse = Predictions(log_probs, torch.tensor([0, 1]))
        dense = Predictions(torch.full((2, 2), 0.5).double().log(), torch.tensor([0, 1]))
        return Compared(dense.loss, sparse.loss, dense.kl_to(sparse))

    def losses(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> torch.Tensor:
        factor = 1 + self._swing * (1 if tokens[0] % 2 else -1)
        return torch.full((len(tokens) - 1,), 2.0 + factor * self.damage(thresholds))


class Layers:
    """A ``Search`` that finds for a tolerance what ``Swinging`` reads."""

    def settled(self, divisions: Sequence[Mapping[int, float]]) -> list[dict[int, LayerLevel]]:
        return [
            {layer: self._layer(tolerance) for layer, tolerance in division.items()}
            for division in divisions
        ]

    def _layer(self, tolerance: float) -> LayerLevel:
        measured = [
            Measurement(length=length, error=tolerance, sparsity=skipped(tolerance))
            for length in (32, 64)
        ]
        head = HeadProfile(
            tau=1 - tolerance, theta=-1.0, calibration=measured, validation=measured[1]
        )
        return LayerLevel(heads=[head], tolerance=tolerance)


def skipped(tolerance: float) -> float:
    return min(0.9, 0.2 + tolerance)


def layer_curves() -> LayerCurves:
    """A head whose tau at every tolerance that a layer may take is 1 less it."""
    points = [torch.tensor([0.05 * factor], dtype=torch.float64) for factor in FACTORS]
    curve = Curve(
        tuple(-point.log() for point in points),
        tuple(points),
        tuple(torch.tensor([skipped(float(point))], dtype=torch.float64) for point in points),
    )
    return LayerCurves({32: curve, 64: curve}, HeldOut((curve,)), 0.05, ())


class Products:
    """Time in proportion to the products."""

    source = "products"

    def seconds(self, head_dim: int, num_heads: int, length: int, density: float) -> float:
        return density


def found(
    folder: Path, swing: float, accepting: bool = True
) -> tuple[dict[int, LayerLevel], BudgetRun]:
    """The layers of the level that reaches the goal, and how it was reached."""
    journal = Journal(folder / FILE_NAME, {})
    windows = {name: list(range(64)) for name in (CALIBRATION, "validation-0-0")}
    parts = [Part("text", 64 * i, 64, list(range(i, i + 64))) for i in range(8)]
    settings = SearchSettings([32, 64], 0.05, 16, 16, seed=0)
    test = AcceptanceTest(parts, journal, Quiet()) if accepting else None
    runs = ModelRuns(lambda: Swinging(swing), windows, journal, lambda: None)
    levels, default, budget = LevelSearch(
        settings,
        runs,
        Layers(),
        {layer: layer_curves() for layer in range(2)},
        AttentionTime(Products(), 64, 1),
        Windows(("validation-0-0",), ()),
        journal,
        Quiet(),
        0,
        64,
    ).run("analytic", GOAL, test)
    assert default == "goal"
    assert budget is not None
    return next(level.layers for level in levels if level.name == default), budget


GOAL = Goal("perplexity", 0.01)


def test_what_the_point_estimate_accepts_the_bound_refuses(tmp_path: Path) -> None:
    """Every window but the steering ones swings, so the mean is as promised and unsure."""
    for name in ("plain", "steady", "swinging"):
        (tmp_path / name).mkdir()
    _, plain = found(tmp_path / "plain", 1.0, accepting=False)
    steady_layers, steady = found(tmp_path / "steady", 0.0)
    layers, swinging = found(tmp_path / "swinging", 1.0)
    assert plain.acceptance is None
    assert plain.allocated == steady.allocated
    assert steady.acceptance is not None
    assert swinging.acceptance is not None
    assert steady.acceptance.candidate == 1
    assert steady.acceptance.bound <= 0.01
    # The first candidate is within the goal as measured, not with its bound.
    first = Swinging(1.0).damage({i: HeadThresholds.of(x.heads) for i, x in steady_layers.items()})
    differences = [first * (2 * (i % 2)) for i in range(8)]
    assert np.expm1(np.mean(differences)) < 0.01 < scipy_bound([0.0] * 8, differences)
    assert swinging.acceptance.candidate == 2
    assert swinging.acceptance.bound <= 0.01
    assert swinging.allocated.sparsity < steady.allocated.sparsity
    damage = Swinging(1.0).damage({i: HeadThresholds.of(x.heads) for i, x in layers.items()})
    again = [damage * (2 * (i % 2)) for i in range(8)]
    assert swinging.acceptance.bound == pytest.approx(scipy_bound([0.0] * 8, again), rel=1e-4)


def test_what_no_bound_proves_is_refused_with_the_bound(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        found(tmp_path, 40.0)
    line = str(refused.value)
    assert line.startswith("--max-perplexity-increase: 0.01 expected at most, 0.0")
    reached = float(line.split("at most, ")[1].split()[0])
    steps = [json.loads(each) for each in (tmp_path / FILE_NAME).read_text().splitlines()[1:]]
    losses = {
        each["step"]: each["result"]["losses"] for each in steps if each["kind"] == "BlockLosses"
    }
    dense = losses.pop("acceptance dense")
    assert len(losses) == CANDIDATES
    bounds = [scipy_bound(dense, each) for each in losses.values()]
    assert min(bounds) > 0.01
    assert reached == pytest.approx(min(bounds), rel=1e-3)


def test_of_few_windows_parts_are_the_samples(tmp_path: Path) -> None:
    class Ramp(Swinging):
        def losses(self, tokens: Sequence[int], thresholds: Any) -> torch.Tensor:
            return torch.arange(1.0, len(tokens)) * (2 if thresholds else 1) / 1000

    parts = [Part("text", 100 * i, 64, list(range(64))) for i in range(3)]
    test = AcceptanceTest(parts, Journal(tmp_path / FILE_NAME, {}), Quiet())
    thresholds = {0: HeadThresholds(torch.tensor([0.9]), torch.tensor([-1.0]))}
    increase = test.increase("x", Ramp(0.0), thresholds)
    blocks = [np.mean(each) for each in np.array_split(np.arange(1, 64) / 1000, 3)] * 3
    assert increase.bound == pytest.approx(scipy_bound(blocks, [2 * each for each in blocks]), 1e-5)
    record = test.record(increase, 1)
    assert (record.num_blocks, len(record.windows)) == (9, 3)
    assert record.windows[2] == TextPart(text="text", start=200, num_tokens=64)


def test_profiles_without_it_keep_their_identity() -> None:
    whole = WholeModel(sparsity=0.4, kl=0.01, perplexity=9.5, dense_perplexity=9.0)
    without = BudgetRun(goal="sparsity", target=0.1, uniform=whole, allocated=whole)
    assert "acceptance" not in without.model_dump_json()
    parts = [TextPart(text="a", start=0, num_tokens=9)] * 2
    accepted = Acceptance(
        increase=-0.01, bound=0.05, confidence=0.95, candidate=1, num_blocks=8, windows=parts
    )
    recorded = without.model_copy(update={"acceptance": accepted})
    assert BudgetRun.model_validate_json(recorded.model_dump_json()) == recorded
    assert BudgetRun.model_validate_json(without.model_dump_json()) == without


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} of {i * i % 97} things\n" for i in range(250)))
    return path


def test_a_job_says_what_was_accepted_where(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recomputed with transformers' own attention and cross-entropy, and with SciPy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "profile.json"
    more = ["--calibration", str(text), "--max-perplexity-increase", "0.9", "--tolerance", "0.2"]
    assert tune.main(command(tiny_model, output, *more)) == 0
    profile = load_profile(output)
    assert profile.tuner.budget is not None
    accepted = profile.tuner.budget.acceptance
    assert accepted is not None
    assert "with 95% confidence, on windows that the search had not" in " ".join(
        capsys.readouterr().out.split()
    )
    tokens = AutoTokenizer.from_pretrained(tiny_model)(text.read_text()).input_ids
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    runner = EndToEnd(open_model(str(tiny_model)), profile.block_q, profile.block_k)
    thresholds = {
        index: HeadThresholds.of(layer.levels[profile.level_index()].heads)
        for index, layer in enumerate(profile.layers)
        if layer.levels[profile.level_index()].is_sparse
    }
    assert thresholds
    per_window = accepted.num_blocks // len(accepted.windows)
    dense: list[float] = []
    sparse: list[float] = []
    for part in accepted.windows:
        assert part.text == str(text)
        window = tokens[part.start : part.start + part.num_tokens]
        ids = torch.tensor(window)
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
        plain = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
        predicted = runner.predict(window, thresholds)
        ours = -predicted.log_probs.gather(1, predicted.targets[:, None])[:, 0].numpy()
        dense += [float(each.mean()) for each in np.array_split(plain, per_window)]
        sparse += [float(each.mean()) for each in np.array_split(ours, per_window)]
    assert len(dense) == accepted.num_blocks
    assert accepted.bound == pytest.approx(scipy_bound(dense, sparse), abs=2e-3)
    assert accepted.bound <= 0.9


def test_too_short_a_text_is_refused_before_the_model_is_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x" * 1000)
    more = ["--calibration", str(short), "--max-perplexity-increase", "0.5"]
    assert tune.main(command(tiny_model, tmp_path / "p.json", *more)) == 2
    error = capsys.readouterr().err
    assert "short.txt: the calibration text has 1000 tokens, 1536 expected for" in error
    assert not (tmp_path / "p.json.work").exists()
