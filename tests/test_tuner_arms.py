"""The benchmark's arms on small layers, and how it measures and reports them."""

import math
import struct
from pathlib import Path

import pytest
import torch

from benchmarks import plot, texts
from benchmarks.tuner_arms import per_head, sweeps
from benchmarks.tuner_arms.arms import HeadCapture
from benchmarks.tuner_arms.results import (
    UNITS,
    print_summary,
    sample_rows,
    time_rows,
)
from benchmarks.tuner_arms.samples import (
    ON_ALL_LAYERS,
    ON_SOME_HEADS,
    ON_SOME_LAYERS,
    Scope,
    choose,
    figures,
)
from benchmarks.tuner_arms.times import WAYS, without_cache
from benchmarks.tuner_arms.unseen import Choice, Meter, meet
from tests.search_layers import captured, hidden
from vllm_afbs.captures import Capture
from vllm_afbs.commands.results import write_rows
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.tuning.search.evaluator import HeadScores, LayerEvaluator
from vllm_afbs.tuning.search.results import HELD_OUT_SLACK
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.search.validation import HELD_OUT_Q_BLOCKS

SETTINGS = SearchSettings([128, 256, 512], 0.05, 16, 16, seed=1)
SCOPE = Scope([0], num_heads=3, slow=[(0, 1)])
Choices = dict[str, list[Choice]]


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return captured(tmp_path_factory.mktemp("capture"), SETTINGS.longest, hidden)


@pytest.fixture(scope="module")
def by_arm(taken: Capture) -> Choices:
    """What every arm chooses; those with an optimiser for each head after few trials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_head, "SINGLE_TRIALS", 7)
        patch.setattr(per_head, "PAPER_TRIALS", 7)
        names = [*ON_ALL_LAYERS, *ON_SOME_LAYERS, *ON_SOME_HEADS]
        return {name: choose(name, SETTINGS, SCOPE, taken) for name in names}


def score(taken: Capture, choices: list[Choice], window: str = "calibration") -> HeadScores:
    heads = [choice.head for choice in choices]
    tau, theta = torch.ones(3), torch.full((3,), -1.0)
    tau[heads] = torch.tensor([choice.tau for choice in choices])
    theta[heads] = torch.tensor([choice.theta for choice in choices])
    # Held-out windows are accepted by the rows that are scored of them.
    q_blocks = HELD_OUT_Q_BLOCKS // len(taken.held_out) if window in taken.held_out else None
    evaluator = LayerScorer(SETTINGS, 0, taken).evaluator(window, SETTINGS.longest, q_blocks)
    scores = evaluator.score(HeadThresholds(tau, theta))
    return HeadScores(scores.error[heads], scores.sparsity[heads])


def test_arms_choose_for_the_heads_that_they_are_for(by_arm: Choices) -> None:
    for name, choices in by_arm.items():
        heads = [1] if name in ON_SOME_HEADS else [0, 1, 2]
        assert [(choice.layer, choice.head) for choice in choices] == [(0, head) for head in heads]
        # With theta off, a head whose blocks hide their mass may have to stay dense.
        assert any(choice.tau < 1.0 for choice in choices), name
        assert name in ("afbs", "theta trials without BO") or all(
            choice.tau < 1.0 for choice in choices
        ), name


def test_arms_stay_within_the_tolerance(by_arm: Choices, taken: Capture) -> None:
    tolerance = SETTINGS.tolerance
    for name in ("random", "grid", "spargeattn", "oracle", "single-fidelity BO", "paper literal"):
        assert (score(taken, by_arm[name]).error <= tolerance).all(), name
    assert float(score(taken, by_arm["one setting"]).error.mean()) <= tolerance
    for name in [*ON_ALL_LAYERS, *ON_SOME_HEADS]:
        if (
            name.startswith(("afbs", "theta", "paper"))
            and name != "theta trials without validation"
        ):
            errors = [score(taken, by_arm[name], each).error for each in taken.held_out]
            assert (torch.stack(errors).mean(0) <= HELD_OUT_SLACK * tolerance).all(), name


def test_no_arm_is_sparser_than_the_oracle(by_arm: Choices, taken: Capture) -> None:
    best = score(taken, by_arm["oracle"]).sparsity
    for name, choices in by_arm.items():
        scores = score(taken, choices)
        heads = [choice.head for choice in choices]
        within = scores.error <= SETTINGS.tolerance
        assert (scores.sparsity <= best[heads] + 0.01)[within].all(), name


def test_arms_spend_what_they_say(by_arm: Choices) -> None:
    expected = {
        "one setting": sweeps.GLOBAL_BISECTIONS,
        "random": sweeps.RANDOM_DRAWS,
        "grid": sweeps.GRID_TAUS * sweeps.GRID_THETAS,
        "spargeattn": sweeps.SPARGE_THETAS * sweeps.SPARGE_BISECTIONS,
        "oracle": sweeps.ORACLE_QUANTILES * (sweeps.ORACLE_TAUS + sweeps.ORACLE_BISECTIONS),
        "single-fidelity BO": 7,
    }
    for name, evaluations in expected.items():
        for choice in by_arm[name]:
            assert choice.evaluations == choice.cost == evaluations, name
            assert choice.validation == 0
    (paper,) = by_arm["paper literal"]
    searched = paper.evaluations - paper.validation
    assert searched == 7 + per_head.PAPER_BISECTIONS
    assert paper.validation >= 1
    # 7 trials at a quarter of the longest length.
    assert per_head.PAPER_BISECTIONS + 7 / 16 < paper.cost < paper.evaluations


def test_ablations_leave_out_what_they_say(by_arm: Choices) -> None:
    search = {
        name: sum(choice.evaluations - choice.validation for choice in choices)
        for name, choices in by_arm.items()
    }
    assert all(choice.theta == -1.0 for choice in by_arm["theta trials without BO"])
    assert any(choice.theta > -1.0 for choice in by_arm["theta trials"])
    assert search["theta trials without BO"] < search["theta trials"]
    assert search["theta trials without binary search"] < search["theta trials"]
    full = by_arm["theta trials without low fidelity"]
    # Of two lengths a block apart, no trial costs less than the shorter with all rows.
    assert sum(choice.cost for choice in full) >= (15 / 16) ** 2 * sum(
        choice.evaluations for choice in full
    )


def test_a_head_alone_is_that_head_of_its_layer(taken: Capture) -> None:
    tau, theta = torch.tensor([0.7, 0.8, 0.9]), torch.tensor([-1.0, 0.1, 0.2])
    layer = LayerEvaluator(taken.load(0, "calibration"), 512, 16, 16)
    together = layer.score(HeadThresholds(tau, theta))
    for head in range(3):
        one = HeadCapture(taken.directory, taken.layers, taken.held_out, head).load(
            0, "calibration"
        )
        alone = LayerEvaluator(one, 512, 16, 16).score(
            HeadThresholds(tau[head, None], theta[head, None])
        )
        torch.testing.assert_close(alone.error[0], together.error[head])
        assert alone.sparsity[0] == together.sparsity[head]


@pytest.mark.parametrize("slope", [0.4, 0.8, 1.4])
@pytest.mark.parametrize("error", [0.005, 0.05, 0.3])
def test_equal_error_is_met(slope: float, error: float) -> None:
    shift = meet(lambda shift: error * math.exp(-slope * shift), 0.05)
    if abs(math.log(error / 0.05) / slope) < 4.0:
        assert error * math.exp(-slope * shift) == pytest.approx(0.05, rel=0.006)
    else:
        assert abs(shift) > 3.9


def test_sparsities_are_compared_at_the_tolerance(by_arm: Choices, taken: Capture) -> None:
    meter = Meter(SETTINGS, taken)
    for name in ("afbs", "grid", "one setting"):
        found = figures(by_arm[name], meter, meter)
        plain = score(taken, by_arm[name])
        assert found["mean error on unseen text"] == pytest.approx(float(plain.error.mean()))
        assert found["mean sparsity on unseen text"] == pytest.approx(float(plain.sparsity.mean()))
        assert found["mean sparsity on calibration text"] == found["mean sparsity on unseen text"]
        # Three heads of 32 blocks: the error moves in steps.
        assert found["error there"] == pytest.approx(SETTINGS.tolerance, rel=0.1)
        denser = found["mean error on unseen text"] > found["error there"]
        gained = found["sparsity at equal error"] - found["mean sparsity on unseen text"]
        assert gained <= 0.0 if denser else gained >= 0.0


def test_dense_heads_stay_dense_at_equal_error(taken: Capture) -> None:
    dense = [Choice(0, head, 1.0, -1.0, 1.0, 1.0, 0.0) for head in range(3)]
    worth = Meter(SETTINGS, taken).at_tolerance(dense)
    assert (worth.error, worth.sparsity) == (0.0, 0.0)


def test_evaluators_keep_nothing_without_the_cache(taken: Capture) -> None:
    thresholds = HeadThresholds(torch.full((3,), 0.9), torch.full((3,), -1.0))
    evaluator = LayerScorer(SETTINGS, 0, taken).evaluator("calibration", 512, None)
    with without_cache():
        without = evaluator.score(thresholds)
    assert "_kept_partials" not in vars(evaluator)
    kept = evaluator.score(thresholds)
    assert "_kept_partials" in vars(evaluator)
    assert torch.equal(without.error, kept.error)


def test_results_are_rows_a_summary_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [
        {
            name: {"9 heads": dict.fromkeys(UNITS, value * (1.0 + seed))}
            for name, value in (("afbs", 0.1), ("grid", 0.2))
        }
        for seed in range(3)
    ]
    rows = sample_rows("python", samples, ["afbs", "grid"], "L4096-tolerance0.05")
    assert len(rows) == 2 * len(UNITS)
    assert {row.shape for row in rows} == {"python-9 heads-L4096-tolerance0.05"}
    assert rows[0].p50 == pytest.approx(0.2)
    times = time_rows({"afbs": {way: [1.0, 2.0] for way in WAYS}}, WAYS, "python-2 layers")
    assert [row.p50 for row in times] == [1.5, 1.5]
    print_summary([*times, *rows])
    assert "at equal error" in capsys.readouterr().out
    write_rows(tmp_path / "tuner_arms.csv", [*times, *rows])
    plot.main(["--results", str(tmp_path)])
    assert "afbs" in (tmp_path / "tuner_arms.svg").read_text(encoding="utf-8")
    assert not (tmp_path / "serving_gpu.svg").exists()


def test_texts_are_read_from_their_packages(tmp_path: Path) -> None:
    words = [b"EMMA", b"", b"By Jane Austen"]
    serialised = b"X\n" + b"".join(
        b"\x00\x04\x00\x09" + struct.pack(">I", len(word)) + word for word in words
    )
    assert texts.r_strings(serialised + b"\x00\x00\x00\xfe") == ["EMMA", "", "By Jane Austen"]
    pages = tmp_path / "usr/share/doc/postgresql-doc-15/html"
    pages.mkdir(parents=True)
    for name in ("a", "b", "short"):
        body = "word " * (1 if name == "short" else 500)
        (pages / f"{name}.html").write_text(
            f'<div class="navheader"><div>Next</div></div><p>{name} {body}</p>', encoding="utf-8"
        )
    calibration, measured = texts.postgres(tmp_path)
    assert calibration.startswith("a word")
    assert measured.startswith("b word")
