"""Fronts against brute force, predicted times by hand, and the search for levels."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.level_arms.__main__ import interval, rows_of
from benchmarks.level_arms.samples import at_kl
from tests.test_tuning_acceptance import Layers, Quiet, layer_curves
from vllm_afbs.backends.cuda.dispatch import LayerKind, measurements, prefill_seconds
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.cost_models import CardCost, CpuCost
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.engine import Predictions
from vllm_afbs.profile.adapters import AdapterProfile
from vllm_afbs.tuning.allocation import front_search
from vllm_afbs.tuning.allocation.adapters import validated
from vllm_afbs.tuning.allocation.analytic import (
    DAMAGE_RUNS,
    Analytic,
    groups_of,
    measured_damage,
)
from vllm_afbs.tuning.allocation.front import Point, ascending, front, hypervolume, spread
from vllm_afbs.tuning.allocation.front_search import (
    OVERALL,
    Fidelity,
    FrontSearch,
)
from vllm_afbs.tuning.allocation.levels import NAMES, LevelSearch, Windows
from vllm_afbs.tuning.allocation.model_runs import ModelRuns
from vllm_afbs.tuning.cost import AttentionTime
from vllm_afbs.tuning.engine import Compared
from vllm_afbs.tuning.journal import FILE_NAME, Journal, read_entries
from vllm_afbs.tuning.search.scorer import SearchSettings

POINTS = st.lists(
    st.builds(Point, st.floats(0.05, 1.0), st.floats(1e-5, 1.0)), min_size=1, max_size=8
)


def beats(one: Point, other: Point) -> bool:
    return one.time_ratio <= other.time_ratio and one.kl <= other.kl and one != other


@given(POINTS)
def test_a_front_is_what_no_other_point_beats(points: list[Point]) -> None:
    found = [points[index] for index in front(points)]
    assert set(found) == {one for one in points if not any(beats(other, one) for other in points)}
    assert [each.time_ratio for each in found] == sorted(
        (each.time_ratio for each in found), reverse=True
    )


@settings(deadline=None)
@given(POINTS)
def test_a_hypervolume_is_the_area_of_the_cells_that_some_point_beats(points: list[Point]) -> None:
    reference = Point(0.9, 0.5)
    times = sorted({p.time_ratio for p in points if p.time_ratio < 0.9} | {0.9})
    logs = sorted({math.log(p.kl) for p in points if p.kl < 0.5} | {math.log(0.5)})
    area = 0.0
    for (left, right), (low, high) in itertools.product(
        itertools.pairwise(times), itertools.pairwise(logs)
    ):
        if any(p.time_ratio <= left and math.log(p.kl) <= low for p in points):
            area += (right - left) * (high - low)
    assert hypervolume(points, reference) == pytest.approx(area)


@given(POINTS, st.data())
def test_levels_get_faster_and_diverge_more(points: list[Point], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(points) - 1))
    chosen = ascending(points, keep)
    assert keep in chosen
    for one, other in itertools.pairwise(points[index] for index in chosen):
        assert other.time_ratio < one.time_ratio
        assert other.kl > one.kl
    # Nothing was dropped that would fit between its neighbours.
    for index in set(range(len(points))) - set(chosen):
        more = sorted([*chosen, index], key=lambda i: -points[i].time_ratio)
        fits = all(
            points[b].time_ratio < points[a].time_ratio and points[b].kl > points[a].kl
            for a, b in itertools.pairwise(more)
        )
        assert not fits or len(chosen) < len(points)


@given(POINTS, st.integers(2, 5))
def test_a_thinned_front_keeps_its_ends(points: list[Point], count: int) -> None:
    ordered = sorted(set(points), key=lambda point: point.kl)
    chosen = spread(ordered, count)
    assert len(chosen) == min(count, len(ordered))
    assert chosen == sorted(set(chosen))
    assert {0, len(ordered) - 1} <= set(chosen)


def test_consecutive_layers_are_grouped_evenly() -> None:
    assert groups_of(range(7), 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert groups_of([4, 9], 6) == [[4], [9]]


def test_times_are_predicted_from_the_cards_measurements() -> None:
    rows = measurements()["sm90-fa3"].rows
    host = measurements()["sm90-fa3"].host_seconds
    measured = [row for row in rows if (row.kind, row.kv_len) == (LayerKind(128), 32768)]
    for row in measured:
        expected = min(row.seconds[kernel] + host[kernel] for kernel in host)
        if row.density >= 1.0:
            expected = row.seconds["dense"] + host["dense"]
        if abs(row.density - round(row.density, 3)) < 1e-9:
            found = prefill_seconds("sm90-fa3", LayerKind(128), row.num_heads, 32768, row.density)
            assert found == pytest.approx(expected, rel=1e-6)
    # Half of the heads: half of the device's time, and all of the host's.
    dense = next(row for row in measured if row.density == 1.0)
    half = prefill_seconds("sm90-fa3", LayerKind(128), dense.num_heads // 2, 32768, 1.0)
    assert half == pytest.approx(dense.seconds["dense"] / 2 + host["dense"], rel=1e-6)
    time = AttentionTime(CardCost("sm90-fa3", 128, 128), 128, 32)
    tenth = prefill_seconds("sm90-fa3", LayerKind(128), 32, 32768, 0.1)
    whole = prefill_seconds("sm90-fa3", LayerKind(128), 32, 32768, 1.0)
    assert time.ratio(32768, [0.1, 1.0]) == pytest.approx((tenth / whole + 1.0) / 2)


def test_times_on_a_cpu_are_products_and_selection() -> None:
    time = AttentionTime(CpuCost(), 64, 9)
    # 0.0347 s of selection beside 1.787 s of dense attention, as measured at 8,192 tokens.
    assert time.ratio(8192, [0.2]) == pytest.approx(0.2 + 0.0347 / 1.787, abs=2e-3)
    assert time.ratio(8192, [1.0]) == 1.0
    # At 512 tokens selection would cost more than it saves: dense.
    assert time.ratio(512, [0.95]) == 1.0
    assert AttentionTime(CpuCost(), 128, 4).ratio(8192, [0.2]) == time.ratio(8192, [0.2])


def test_times_are_predicted_without_vllm_and_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['vllm'] = sys.modules['triton'] = None\n"
        "from vllm_afbs.cost_models import CardCost\n"
        "assert 0 < CardCost('sm90-fa3', 128, 128).seconds(128, 32, 32768, 0.1) < 0.01\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Uneven:
    """A model whose layers differ in what their tolerances, squared, do to its predictions.

    Thresholds carry the tolerance: tau is 1 less it. The law is the analytic one but for the last
    two layers, whose damage is shared: together they do less than alone.
    """

    weights = (0.2, 0.4, 2.0, 1.0)

    def __init__(self) -> None:
        self.runs = 0

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        self.runs += 1
        each = [
            weight * float(1 - thresholds[layer].tau[0]) ** 2 if layer in thresholds else 0.0
            for layer, weight in enumerate(self.weights)
        ]
        damage = each[0] + each[1] + max(each[2], each[3])
        spread_of = math.sqrt(1 - math.exp(-2 * damage)) / 2
        sparse = torch.tensor([[0.5 + spread_of, 0.5 - spread_of]], dtype=torch.float64).log()
        dense = Predictions(torch.full((1, 2), 0.5).double().log(), torch.tensor([0]))
        other = Predictions(sparse, torch.tensor([0]))
        return Compared(dense.loss, other.loss, dense.kl_to(other))

    def losses(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> torch.Tensor:
        raise NotImplementedError


class Linear:
    """Time in proportion to the products."""

    source = "products"

    def seconds(self, head_dim: int, num_heads: int, length: int, density: float) -> float:
        return density


JOB = SearchSettings([32, 64], 0.05, 16, 16, seed=0)
CURVES = {layer: layer_curves() for layer in range(4)}
TIME = AttentionTime(Linear(), 64, 1)
WINDOWS = {name: list(range(64)) for name in (CALIBRATION, "validation-0-0", "unseen-0")}


def analytic_of(damage: Sequence[float]) -> Analytic:
    return Analytic(0.05, 64, CURVES, TIME, torch.tensor(damage, dtype=torch.float64))


def test_no_division_of_as_much_time_is_predicted_to_do_less() -> None:
    """Against every division of four layers among three of the factors."""
    analytic = analytic_of(Uneven.weights)
    chosen = analytic.divided(1.0)
    uniform = analytic.one_tolerance(1.0)
    limit = analytic.total(uniform)
    assert analytic.total(chosen) <= limit
    assert analytic.time_ratio(chosen) < analytic.time_ratio(uniform)
    factors = [0.25, 1.0, 4.0]
    for each in itertools.product(factors, repeat=4):
        division = {layer: 0.05 * factor for layer, factor in enumerate(each)}
        if analytic.total(division) <= analytic.total(chosen):
            assert analytic.time_ratio(division) >= analytic.time_ratio(chosen) - 1e-9
    # A layer that does ten times the damage gets less of it.
    assert chosen[2] < chosen[0]


def test_deep_models_share_runs_of_damage(tmp_path: Path) -> None:
    model = Uneven()
    journal = Journal(tmp_path / FILE_NAME, {})
    runs = ModelRuns(lambda: model, WINDOWS, journal, lambda: None)
    each = measured_damage(runs, CURVES, 32)
    assert model.runs == 4
    # Of equal errors, as the weights; and nearly the weights themselves, by the square law.
    assert (each / each[1]).tolist() == pytest.approx([0.5, 1.0, 5.0, 2.5], rel=0.05)
    deep = dict.fromkeys(range(32), CURVES[0])
    assert [len(group) for group in groups_of(list(deep), DAMAGE_RUNS)] == [2] * 16
    model = Uneven()
    (tmp_path / "deep").mkdir()
    journal = Journal(tmp_path / "deep" / FILE_NAME, {})
    found = measured_damage(ModelRuns(lambda: model, WINDOWS, journal, lambda: None), deep, 32)
    assert model.runs == 16
    assert found[0] == found[1]
    # Two layers of weights 0.2 and 0.4: their mean.
    assert float(found[0] / each[1]) == pytest.approx(0.75, rel=0.05)


def searched(folder: Path, proposer: str, model: Uneven) -> FrontSearch:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / FILE_NAME, {})
    runs = ModelRuns(lambda: model, WINDOWS, journal, lambda: None)
    analytic = analytic_of(Uneven.weights)
    fidelities = Fidelity(["validation-0-0"], 32), Fidelity(["validation-0-0"], 64)
    return FrontSearch(analytic, analytic.divided, runs, fidelities, journal, 0, proposer)  # type: ignore[arg-type]


@pytest.mark.parametrize("proposer", ["ax", "ax, one objective", "random", "coordinate"])
def test_a_search_ends_in_measured_divisions_and_resumes_to_the_same(
    proposer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_search, "NUM_DESIGN", 1)
    monkeypatch.setattr(front_search, "NUM_PROPOSED", 1)
    model = Uneven()
    search = searched(tmp_path / "whole", proposer, model)
    found = search.run()
    assert [each.source for each in found[:5]] == ["base"] * 5
    for each in found:
        thresholds = {
            layer: CURVES[layer].thresholds(tolerance) for layer, tolerance in each.division.items()
        }
        assert each.point.kl == pytest.approx(model.compare([0], thresholds).kl)
        assert each.point.time_ratio == search.analytic.time_ratio(each.division)
        assert all(0.05 / 4 <= tolerance <= 0.05 * 4 for tolerance in each.division.values())
    entries = read_entries_of(tmp_path / "whole")
    proposals = [entry for entry in entries if entry.kind == "Proposal"]
    assert len(proposals) == 2
    # Cut off in the middle, as by a kill, and gone on with.
    lines = (tmp_path / "whole" / FILE_NAME).read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    last = max(index for index, line in enumerate(lines) if "Proposal" in line)
    (tmp_path / "cut" / FILE_NAME).write_text("".join(lines[:last]))
    assert searched(tmp_path / "cut", proposer, Uneven()).run() == found
    # Nothing is run again.
    again = Uneven()
    assert searched(tmp_path / "whole", proposer, again).run() == found
    assert again.runs == 0


def read_entries_of(folder: Path) -> list[object]:
    lines = (folder / FILE_NAME).read_text().splitlines()
    body = folder / "body.jsonl"
    body.write_text("".join(f"{line}\n" for line in [json.dumps({}), *lines[1:]]))
    return list(read_entries(body))


def test_ax_finds_what_the_analytic_law_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two layers that share their damage, the cheaper one is free."""
    monkeypatch.setattr(front_search, "NUM_PROPOSED", 4)
    found = searched(tmp_path / "s", "ax", Uneven()).run()
    reference = Point(1.0, 2 * max(each.point.kl for each in found[:5]))
    base = hypervolume([each.point for each in found[:5]], reference)
    assert hypervolume([each.point for each in found], reference) > base


def level_search(folder: Path, unseen: tuple[str, ...]) -> LevelSearch:
    journal = Journal(folder / FILE_NAME, {})
    runs = ModelRuns(Uneven, WINDOWS, journal, lambda: None)
    return LevelSearch(
        JOB,
        runs,
        Layers(),
        CURVES,
        TIME,
        Windows(("validation-0-0",), unseen),
        journal,
        Quiet(),
        0,
        64,
    )


@pytest.mark.parametrize("kind", ["analytic", "ax"])
def test_levels_go_from_nearly_lossless_to_fast(kind: str, tmp_path: Path) -> None:
    unseen = ("unseen-0",) if kind == "ax" else ()
    levels, default, budget = level_search(tmp_path, unseen).run(kind, None, None)  # type: ignore[arg-type]
    assert budget is None
    assert default == "balanced"
    names = [level.name for level in levels]
    assert [name for name in NAMES if name in names] == names
    assert default in names
    for slower, faster in itertools.pairwise(levels):
        assert slower.point.time_ratio > faster.point.time_ratio
        assert slower.point.kl < faster.point.kl
    balanced = levels[names.index(default)]
    assert balanced.tolerance == JOB.tolerance
    thresholds = {i: HeadThresholds.of(x.heads) for i, x in balanced.layers.items()}
    assert balanced.runs.whole.kl == pytest.approx(Uneven().compare([0], thresholds).kl)
    # As much damage, by the law, as one tolerance does, and less time.
    one = {layer: CURVES[layer].thresholds(0.05) for layer in CURVES}
    assert balanced.runs.whole.kl <= Uneven().compare([0], one).kl * 1.2
    ratios = [each.attention_time_ratio for each in balanced.by_length]
    assert ratios == pytest.approx([1 - each.sparsity for each in balanced.by_length])
    assert len(levels) == len(OVERALL) or kind == "ax"


@dataclass
class Adapted:
    """A LoRA adapter with which a model diverges so much more than ``Uneven``."""

    ratio: float
    sha256: str = "a" * 64
    name: str = "one"
    runs: int = 0

    def sparse_model(self, block_q: int, block_k: int) -> "Adapted":
        return self

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        self.runs += 1
        found = Uneven().compare(tokens, thresholds)
        return Compared(found.dense_loss, found.loss, self.ratio * found.kl)

    def losses(self, tokens: Sequence[int], thresholds: Any) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(("ratio", "holds"), [(0.5, True), (1.24, True), (1.26, False)])
def test_a_level_holds_for_an_adapter_that_diverges_as_the_base_model_does(
    ratio: float, holds: bool, tmp_path: Path
) -> None:
    levels, *_ = level_search(tmp_path, ()).run("analytic", None, None)
    entries = len(read_entries_of(tmp_path))
    adapter = Adapted(ratio)

    def validate(adapter: Adapted) -> AdapterProfile:
        journal = Journal(tmp_path / FILE_NAME, {})
        load = partial(adapter.sparse_model, 16, 16)
        return validated(adapter, ModelRuns(load, WINDOWS, journal, int, adapter.sha256), levels)

    found = validate(adapter)
    assert (found.name, found.sha256) == (adapter.name, adapter.sha256)
    assert [own.holds for own in found.levels] == [holds] * len(levels)
    assert [own.kl for own in found.levels] == [
        pytest.approx(ratio * level.runs.whole.kl) for level in levels if level.runs is not None
    ]
    # Its runs are its own, and a job that goes on has them.
    assert adapter.runs == len(levels) == len(read_entries_of(tmp_path)) - entries
    again = Adapted(ratio)
    assert validate(again) == found
    assert again.runs == 0
    other = Adapted(ratio, sha256="b" * 64)
    validate(other)
    assert other.runs == len(levels)


def test_untuned_layers_count_as_dense(tmp_path: Path) -> None:
    search = level_search(tmp_path, ())
    (layers,) = Layers().settled([dict.fromkeys(range(4), 0.05)])
    (_, alone), (_, beside) = (
        LevelSearch(**{**vars(search), "num_dense": count}).estimates(layers) for count in (0, 4)
    )
    assert alone.attention_time_ratio == pytest.approx(0.75)
    assert beside.attention_time_ratio == pytest.approx(0.875)
    assert beside.sparsity == pytest.approx(alone.sparsity / 2)


def test_benchmark_figures_are_compared_at_equal_divergence() -> None:
    assert at_kl([0.01, 0.04], [0.5, 0.7], 0.02) == pytest.approx(0.6)
    assert at_kl([0.01, 0.04], [0.5, 0.7], 0.05) is None
    arms = {"one tolerance": 1.0, "analytic": 1.1, "ax around analytic": 1.2}
    taken = [
        {name: {"hypervolume": value + seed, "model runs": 5.0} for name, value in arms.items()}
        for seed in range(2)
    ]
    rows = {row.what: row for row in rows_of(taken, "2 samples")}
    assert rows["ax around analytic: hypervolume over analytic"].p50 == pytest.approx(0.1)
    assert "analytic: hypervolume over analytic" not in rows
    mean, half = interval([0.1, 0.3])
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(12.706 * 0.1, rel=1e-3)
