"""The tuner's HTML report: what it says, and that a real browser draws it without complaint."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_afbs.tuning.allocation.budget import Damage

from tests.profiles import one_level, uniform_profile
from vllm_afbs.profile.schema import Measurement
from vllm_afbs.profile.tuner_run import Acceptance, BudgetRun, TextPart, WholeModel
from vllm_afbs.tuning.journal import Entry
from vllm_afbs.tuning.report import _convergence, write_report
from vllm_afbs.tuning.run import Captured
from vllm_afbs.tuning.search.results import Attempt, Refined, ThetaTrial, Validated

CHROMIUM = shutil.which("chromium")


def steps() -> list[Entry]:
    """A job's steps: two trials, the first at a shorter length, and what refining found."""

    def done(step: str, kind: type[Any], result: Any) -> Entry:
        return Entry.of(step, kind, result, seconds=0.5, evaluations=8, cost=2.0)

    def per_head(value: float) -> torch.Tensor:
        return torch.full((4,), value)

    ones = per_head(1.0)
    trials = [
        ThetaTrial(ones, ones, ones, per_head(share), length, quantile=0.1)
        for length, share in ((2048, 0.3), (8192, 0.4))
    ]
    refined = Refined(ones, ones, ones, per_head(0.5), error=ones)
    return [
        Entry.of("capture", Captured, Captured(1.0), seconds=0.0),
        *(
            done(f"layer {layer} theta {number}", Attempt, Attempt(trial))
            for layer in range(2)
            for number, trial in enumerate([*trials, None])
        ),
        *(done(f"layer {layer} refine", Refined, refined) for layer in range(2)),
        done("layer 0 validate", Validated, Validated(())),
        *(
            Entry.of(f"damage of layer {layer}", Damage, Damage(0.1 + layer), seconds=0.5)
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


def test_convergence_counts_what_was_found_at_the_longest_length() -> None:
    (curve,) = _convergence(uniform_profile(), steps()).data
    heads = uniform_profile().model.num_heads
    assert list(curve.x) == pytest.approx([count * 8 / heads for count in (1, 2, 3)])
    assert list(curve.y) == pytest.approx([0.0, 0.4, 0.5])


def test_report_without_a_journal_has_no_convergence(tmp_path: Path) -> None:
    write_report(uniform_profile(), [], tmp_path / "r.html")
    assert "Convergence" not in (tmp_path / "r.html").read_text(encoding="utf-8")


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
    assert len(figures) == 8
    # Plotly draws each figure into such elements once it has run.
    drawn = re.findall(r'id="figure-\d+"[^>]*class="[^"]*js-plotly-plot', done.stdout)
    assert len(drawn) == 8
