"""The tuner's HTML report: what it says, and that a real browser draws it without complaint."""

import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.profiles import one_level, uniform_profile
from vllm_afbs.profile.schema import HeadProfile, LengthEstimate, Measurement
from vllm_afbs.profile.tuner_run import Acceptance, BudgetRun, TextPart, WholeModel
from vllm_afbs.tuning.allocation.model_runs import Damage
from vllm_afbs.tuning.journal import Entry
from vllm_afbs.tuning.level_rows import KL_BY_WINDOW, level_rows
from vllm_afbs.tuning.report import _curves, write_report
from vllm_afbs.tuning.run import Captured
from vllm_afbs.tuning.search.curve import CLOSE, Curve
from vllm_afbs.tuning.search.results import HeldOut, Settled

CHROMIUM = shutil.which("chromium")


def steps() -> list[Entry]:
    """A job's steps: curves at two lengths, and what was made of them."""

    def done(step: str, kind: type[Any], result: Any) -> Entry:
        return Entry.of(step, kind, result, seconds=0.5, evaluations=8, cost=2.0)

    def points(*values: float) -> tuple[torch.Tensor, ...]:
        return tuple(torch.full((4,), value, dtype=torch.float64) for value in values)

    curve = Curve(points(3.0, 2.0), points(0.0125, 0.05), points(0.3, 0.5))
    heads = (HeadProfile(tau=0.9, theta=-1.0),)
    return [
        Entry.of("capture", Captured, Captured(1.0), seconds=0.0),
        *(done(f"layer {layer} explore 2048", Curve, curve) for layer in range(2)),
        *(done(f"layer {layer} curve", Curve, curve) for layer in range(2)),
        done("layer 0 held out", HeldOut, HeldOut((curve,))),
        done("layer 0 settle 0.05", Settled, Settled(heads)),
        *(
            Entry.of(
                f"damage of layers {layer} to {layer}", Damage, Damage(0.1 + layer), seconds=0.5
            )
            for layer in range(2)
        ),
    ]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    profile = uniform_profile(model_name="<b>model</b>")
    heads = list(profile.layers[1].levels[0].heads)
    measured = Measurement(length=8192, error=0.0575, sparsity=0.625)
    heads[2] = heads[2].model_copy(update={"validation": measured})
    layers = [one_level(profile.layers[0].levels[0].heads, tolerance=0.025), one_level(heads)]
    path = tmp_path / "profile.html"
    whole = WholeModel(sparsity=0.4, kl=0.01, perplexity=9.5, dense_perplexity=9.0)
    windows = [TextPart(text="<i>a.txt", start=9 * i, num_tokens=8) for i in range(4)]
    acceptance = Acceptance(
        increase=0.0123, bound=0.0456, confidence=0.95, candidate=2, num_blocks=8, windows=windows
    )
    budget = BudgetRun(
        goal="perplexity", target=0.1, uniform=whole, allocated=whole, acceptance=acceptance
    )
    run = profile.tuner.model_copy(update={"budget": budget})
    write_report(profile.model_copy(update={"layers": layers, "tuner": run}), steps(), path)
    return path


def test_report_names_the_worst_heads_and_the_provenance(report: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", report.read_text(encoding="utf-8"), flags=re.S)
    assert "<td>layer 1, head 2</td>" in text
    assert ">0.0575<" in text
    assert ">1.15<" in text  # over the tolerance of 0.05
    assert "perplexity: an increase of at most 0.1" in text
    assert "by 1.23%, by at most 4.56% with 95% confidence" in text
    assert "(4 of &lt;i&gt;a.txt; 8 blocks)" in text
    assert "&lt;b&gt;model&lt;/b&gt;" in text
    assert "<b>model" not in text
    assert not re.findall(r"(?:src|href)=[\"']?http", text)


def test_curves_are_means_over_layers() -> None:
    (line,) = _curves(uniform_profile(), steps()).data
    found = dict(zip(line.x, line.y, strict=True))
    assert found[0.05] == pytest.approx(0.5)
    # Between the points, at the aim of the reading; and at a quarter no less than measured.
    share = math.log(0.025 * math.sqrt(CLOSE) / 0.0125) / math.log(4)
    assert found[0.025] == pytest.approx(0.3 + 0.2 * share)
    assert found[0.0125] == pytest.approx(0.3)


def test_levels_say_what_they_cost_and_gain_and_how_sure_that_is() -> None:
    profile = uniform_profile()
    whole = WholeModel(sparsity=0.4, kl=0.01, perplexity=9.18, dense_perplexity=9.0)
    level = profile.levels[0].model_copy(
        update={
            "name": "balanced",
            "whole_model": whole,
            "by_length": [
                LengthEstimate(length=2048, sparsity=0.25, attention_time_ratio=0.8),
                LengthEstimate(length=8192, sparsity=0.5),
            ],
        }
    )
    run = profile.tuner.model_copy(
        update={"settings": {KL_BY_WINDOW: {"balanced": [0.008, 0.012]}}}
    )
    changed = {"levels": [level], "default_level": "balanced", "tuner": run}
    (row,) = level_rows(profile.model_copy(update=changed))
    assert row["level"] == "balanced *"
    assert row["2048 tokens"] == "25.0%, 1.25x"
    assert row["8192 tokens"] == "50.0%"
    # The standard error of two windows: half of their distance.
    assert row["KL, nats"] == "0.01000 ± 0.00200"
    assert (row["windows"], row["perplexity"]) == ("2", "+2.00%")


def test_report_without_a_journal_has_no_curves(tmp_path: Path) -> None:
    write_report(uniform_profile(), [], tmp_path / "r.html")
    assert "Sparsity by tolerance" not in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
def test_a_browser_draws_every_figure_without_an_error(report: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--dump-dom", report.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    figures = re.findall(r'id="figure-\d+"', done.stdout)
    assert len(figures) == 7
    # Plotly draws each figure into such elements once it has run.
    drawn = re.findall(r'id="figure-\d+"[^>]*class="[^"]*js-plotly-plot', done.stdout)
    assert len(drawn) == 7
