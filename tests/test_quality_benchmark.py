"""The benchmark of selections at equal sparsity, on a tiny model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plot
from benchmarks.domains import Domain
from benchmarks.quality.bench import Bench, Plan, Setting
from benchmarks.quality.results import rows_of
from vllm_afbs.commands.results import write_rows
from vllm_afbs.evaluate.baselines import Tuned, UniformTau
from vllm_afbs.evaluate.in_process import Runner
from vllm_afbs.evaluate.suite import Amounts
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.journal import FILE_NAME, Journal

BLOCK, LENGTH = 16, 256
PLAN = Plan("tiny", Amounts(LENGTH, 2, 3, 0, 1, 0), 0, (), (0.3,), LENGTH)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("texts")
    files = []
    for name, step in (("calibration", 7), ("measured", 11)):
        files.append(folder / name)
        files[-1].write_text("".join(chr(97 + i * i // step % 26) for i in range(800)))
    domain = Domain("letters", *files)
    return Setting(domain, domain)


def bench(setting: Setting, model_dir: Path, folder: Path, runner: Any) -> Bench:
    model = open_model(str(model_dir))
    return Bench(PLAN, setting, model, runner, Journal(folder / FILE_NAME, {}))


def test_methods_meet_at_a_sparsity_and_a_second_run_measures_nothing(
    setting: Setting, tiny_model: Path, tmp_path: Path
) -> None:
    runner = Runner(open_model(str(tiny_model)))
    thresholds = {
        layer: HeadThresholds(torch.tensor([0.3, 0.5, 0.6, 0.7]), torch.full((4,), -1.0))
        for layer in range(2)
    }
    deeper = {
        layer: HeadThresholds(1 - (1 - each.tau) * math.exp(3), each.theta)
        for layer, each in thresholds.items()
    }
    tuned = [
        Tuned("near", BLOCK, BLOCK, 0.0, thresholds=thresholds),
        Tuned("far", BLOCK, BLOCK, 0.0, thresholds=deeper),
    ]
    candidates = {"one tau": [UniformTau("one tau", BLOCK, BLOCK)], "afbs": tuned}
    first = bench(setting, tiny_model, tmp_path, runner)
    records = list(first.run(candidates, [0.3, 0.5]))
    names = [record["method"] for record in records]
    assert names[:4] == ["one tau at 0.3", "one tau at 0.5", "afbs at 0.3", "afbs at 0.5"]
    assert names[4:] == ["afbs, near, as given", "afbs, far, as given"]
    for record, wanted in zip(records, (0.3, 0.5, 0.3, 0.5), strict=False):
        assert record["sparsity"] == pytest.approx(wanted, abs=0.06)
    # The candidate that is moved least was taken, and as given nothing is moved.
    assert abs(records[3]["knob"]) < 2.0
    assert records[4]["knob"] == 0.0
    again = bench(setting, tiny_model, tmp_path, None)
    assert list(again.run(candidates, [0.3, 0.5])) == records
    rows = {row.what: row for row in rows_of(records, LENGTH)}
    row = rows["afbs at 0.5: perplexity ratio"]
    assert row.shape == "letters-L256"
    low, high = (rows[f"{row.what}, {end}"].p50 for end in ("low", "high"))
    assert low <= row.p50 <= high
    write_rows(tmp_path / "quality.csv", list(rows.values()))
    plot.main(["--results", str(tmp_path)])
    drawn = (tmp_path / "quality.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("one tau", "afbs", row.shape))


def test_spargeattns_tuner_gives_a_method(
    setting: Setting, tiny_model: Path, tmp_path: Path
) -> None:
    (method,) = bench(setting, tiny_model, tmp_path, None).tuned_by_spargeattn()
    assert isinstance(method, Tuned)
    assert sorted(method.thresholds) == [0, 1]
    assert all(len(each.tau) == 4 for each in method.thresholds.values())
    (again,) = bench(setting, tiny_model, tmp_path, None).tuned_by_spargeattn()
    assert isinstance(again, Tuned)
    assert again.thresholds[1].tau.tolist() == method.thresholds[1].tau.tolist()
