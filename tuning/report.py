"""The report beside a profile: one self-contained HTML file for people."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import THETA_OFF
from vllm_afbs.profile.schema import HeadProfile, Profile
from vllm_afbs.tuning.allocation.acceptance import describe
from vllm_afbs.tuning.allocation.budget import Damage
from vllm_afbs.tuning.journal import Entry
from vllm_afbs.tuning.search.results import Attempt, Refined, Trial

_STEP = re.compile(r"layer (?P<layer>\d+) (?P<stage>[a-z]+)")
_DAMAGE = re.compile(r"damage of layer (?P<layer>\d+)")
_TEMPLATE = "report.html.j2"
_WORST = 10
_SPENT = ("evaluations", "cost", "seconds")
Matrix = list[list[float | None]]


def write_report(profile: Profile, steps: Sequence[Entry], path: Path) -> None:
    """Writes a profile's report.

    Args:
        profile: The profile.
        steps: The job's journal, in its order. Without steps, the report leaves out convergence and
            cost by stage.
        path: The HTML file; replaced atomically.

    Raises:
        OSError: The file cannot be written.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    page = templates.get_template(_TEMPLATE).render(
        profile=profile,
        plotly=get_plotlyjs(),
        totals=_totals(profile),
        figures=[
            {"title": title, "note": note, "html": _html(figure, f"figure-{index}")}
            for index, (title, note, figure) in enumerate(_figures(profile, steps))
        ],
        worst=_worst(profile),
    )
    write_atomically(path, page)


def _html(figure: go.Figure, identifier: str) -> str:
    figure.update_layout(template="simple_white", height=460, margin={"t": 20})
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=identifier))


def _figures(profile: Profile, steps: Sequence[Entry]) -> Iterable[tuple[str, str, go.Figure]]:
    longest = profile.max_seq_len
    yield (
        "Sparsity by layer and head",
        f"Share of the block products skipped on held-out text at {longest} tokens.",
        _heat_map(profile, _matrix(profile, _sparsity), "sparsity", "Viridis", (0.0, 1.0)),
    )
    yield (
        "Error by layer and head",
        "Relative L1 against dense attention on held-out text, over the layer's tolerance. Dense "
        "heads have none.",
        _heat_map(profile, _over_tolerance(profile), "error / tolerance", "RdBu_r", (0.0, 2.0)),
    )
    yield (
        "τ by layer and head",
        "Share of the blocks' estimated mass that is kept; 1 is dense.",
        _heat_map(profile, _matrix(profile, lambda head: head.tau), "tau", "Viridis", (None, 1.0)),
    )
    yield (
        "Error against sparsity",
        "Each head on held-out text, and the heads that no other beats in both (Pareto front).",
        _pareto(profile),
    )
    yield (
        "Sparsity by context length",
        "Mean over the heads that were measured at each calibrated length.",
        _by_length(profile),
    )
    if profile.tuner.budget is not None:
        yield (
            "Budget by layer",
            "Each layer's tolerance, what it skips with it on held-out text, and its share of the "
            "damage before (KL divergence with that layer alone sparse at the job's tolerance, "
            "over the sum of all layers).",
            _budget(profile, steps),
        )
    if steps:
        yield (
            "Convergence",
            "Best mean sparsity found so far at the longest length, by evaluations a head, "
            "mean over layers.",
            _convergence(profile, steps),
        )
        yield (
            "Cost by stage",
            "Cost is evaluations weighted by (length / longest)² and the share of rows.",
            _cost(steps),
        )


def _sparsity(head: HeadProfile) -> float:
    return head.validation.sparsity if head.validation is not None else 0.0


def _error(head: HeadProfile) -> float:
    return head.validation.error if head.validation is not None else 0.0


def _heads(profile: Profile, layer: int) -> list[HeadProfile]:
    return profile.layers[layer].levels[profile.level_index()].heads


def _tolerance(profile: Profile, layer: int) -> float:
    return profile.tolerance_of(layer, profile.level_index())


def _matrix(profile: Profile, value: Any) -> Matrix:
    return [[value(head) for head in _heads(profile, index)] for index in profile.full_layers]


def _over_tolerance(profile: Profile) -> Matrix:
    return [
        [_error(head) / _tolerance(profile, index) for head in _heads(profile, index)]
        for index in profile.full_layers
    ]


def _budget(profile: Profile, steps: Sequence[Entry]) -> go.Figure:
    layers = profile.full_layers
    figure = go.Figure(
        go.Bar(x=layers, y=[_tolerance(profile, layer) for layer in layers], name="tolerance")
    )
    heads = [_heads(profile, layer) for layer in layers]
    means = [sum(map(_sparsity, each)) / len(each) for each in heads]
    figure.add_scatter(x=layers, y=means, yaxis="y2", name="sparsity", mode="lines+markers")
    kls = {
        int(match["layer"]): step.read(Damage).kl
        for step in steps
        if (match := _DAMAGE.fullmatch(step.step))
    }
    total = sum(kls.values()) or 1.0
    shares = [kls[layer] / total for layer in sorted(kls)]
    figure.add_scatter(
        x=sorted(kls), y=shares, yaxis="y2", name="share of the damage", mode="markers"
    )
    return figure.update_layout(
        xaxis_title="layer",
        yaxis_title="tolerance, relative L1",
        yaxis2={"title": "share", "overlaying": "y", "side": "right", "range": [0, 1]},
        legend={"orientation": "h", "y": 1.1},
    )


def _heat_map(
    profile: Profile, values: Matrix, name: str, colours: str, bounds: tuple[float | None, float]
) -> go.Figure:
    return go.Figure(
        go.Heatmap(
            z=values,
            y=[str(layer) for layer in profile.full_layers],
            colorscale=colours,
            zmin=bounds[0],
            zmax=bounds[1],
            colorbar={"title": name},
            hovertemplate=f"layer %{{y}}, head %{{x}}<br>{name} %{{z:.3f}}<extra></extra>",
        )
    ).update_layout(
        xaxis_title="head",
        yaxis_title="layer",
        yaxis_autorange="reversed",
        yaxis_type="category",  # layers without full attention are left out
    )


def _validated(profile: Profile) -> list[tuple[str, HeadProfile, float]]:
    """Sparse heads with their names and tolerances."""
    return [
        (f"layer {i}, head {j}", head, _tolerance(profile, i))
        for i in profile.full_layers
        for j, head in enumerate(_heads(profile, i))
        if head.validation is not None and head.tau < 1.0
    ]


def _pareto(profile: Profile) -> go.Figure:
    heads = _validated(profile)
    points = [(_sparsity(head), _error(head)) for _, head, _ in heads]
    figure = go.Figure(
        go.Scatter(
            x=[sparsity for sparsity, _ in points],
            y=[error for _, error in points],
            text=[name for name, _, _ in heads],
            mode="markers",
            name="heads",
        )
    )
    front: list[tuple[float, float]] = []
    for sparsity, error in sorted(points, key=lambda point: (-point[0], point[1])):
        if not front or error < front[-1][1]:
            front.append((sparsity, error))
    figure.add_scatter(
        x=[sparsity for sparsity, _ in front],
        y=[error for _, error in front],
        mode="lines",
        line_shape="hv",
        name="Pareto front",
    )
    figure.add_hline(profile.tuner.tolerance, line_dash="dot", annotation_text="tolerance")
    return figure.update_layout(xaxis_title="sparsity", yaxis_title="relative L1 error")


def _by_length(profile: Profile) -> go.Figure:
    samples: dict[int, list[float]] = defaultdict(list)
    for head in profile.heads_of(profile.level_index()):
        for measured in head.calibration:
            samples[measured.length].append(measured.sparsity)
    lengths = sorted(samples)
    means = [sum(samples[length]) / len(samples[length]) for length in lengths]
    figure = go.Figure(go.Bar(x=[str(length) for length in lengths], y=means))
    return figure.update_layout(
        xaxis_title="tokens", yaxis_title="mean sparsity", xaxis_type="category"
    )


def _convergence(profile: Profile, steps: Sequence[Entry]) -> go.Figure:
    """Mean over layers of the best sparsity so far, as if all layers were searched in step."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step in steps:
        match, reached = _STEP.match(step.step), _reached(step, profile.max_seq_len)
        if match is None or reached is None:
            continue
        curve = curves[match["layer"]]
        spent, best = curve[-1] if curve else (0.0, 0.0)
        curve.append((spent + step.evaluations / profile.model.num_heads, max(best, reached)))
    count = max((len(curve) for curve in curves.values()), default=0)
    rows = [
        [curve[min(index, len(curve) - 1)] for curve in curves.values()] for index in range(count)
    ]
    figure = go.Figure(
        go.Scatter(
            x=[sum(spent for spent, _ in row) / len(row) for row in rows],
            y=[sum(best for _, best in row) / len(row) for row in rows],
            mode="lines+markers",
        )
    )
    return figure.update_layout(xaxis_title="evaluations a head", yaxis_title="mean sparsity")


def _reached(step: Entry, longest: int) -> float | None:
    """Mean sparsity that a step found at the longest length; None if it searched no tau.

    A trial at another length has found nothing there: 0.
    """
    if step.kind == Refined.__name__:
        return float(step.read(Refined).sparsity.mean())
    trial: Trial | None = None
    if step.kind == Trial.__name__:
        trial = step.read(Trial)
    elif step.kind == Attempt.__name__:
        trial = step.read(Attempt).trial
    if trial is None:
        return None
    return float(trial.sparsity.mean()) if trial.length == longest else 0.0


def _cost(steps: Sequence[Entry]) -> go.Figure:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for step in steps:
        if match := _STEP.match(step.step):
            for index, name in enumerate(_SPENT):
                totals[match["stage"]][index] += getattr(step, name)
    stages = list(totals)
    figure = go.Figure()
    for index, name in enumerate(_SPENT):
        whole = sum(each[index] for each in totals.values()) or 1.0
        values = [totals[stage][index] for stage in stages]
        figure.add_bar(
            x=stages,
            y=[value / whole for value in values],
            name=name,
            text=[f"{value:.0f}" for value in values],
        )
    return figure.update_layout(xaxis_title="stage", yaxis_title="share", yaxis_tickformat=".0%")


def _totals(profile: Profile) -> dict[str, str]:
    heads = profile.heads_of(profile.level_index())
    sparse = [head for head in heads if head.tau < 1.0]
    run, tuned = profile.tuner, profile.num_tuned_heads
    return {
        **_layers(profile),
        "Sparse heads": f"{len(sparse)} of {len(heads)}",
        "Mean sparsity, held out": f"{sum(map(_sparsity, heads)) / len(heads):.3f}",
        "Mean error, held out": f"{sum(map(_error, heads)) / len(heads):.4f}",
        "Tolerance": f"{run.tolerance:g}",
        **_whole_model(profile),
        "Evaluations": f"{run.evaluations} ({run.evaluations / tuned:.1f} a head)",
        "Cost": f"{run.cost:.0f} ({run.cost / tuned:.2f} a head)",
        "Wall time": f"{run.wall_seconds:.0f} s",
    }


def _layers(profile: Profile) -> dict[str, str]:
    num_full, num_layers = len(profile.full_layers), len(profile.layers)
    if num_full == num_layers:
        return {}
    return {"Layers": f"{num_full} of {num_layers} layers have full attention"}


def _whole_model(profile: Profile) -> dict[str, str]:
    budget = profile.tuner.budget
    if budget is None:
        return {}
    asked = "at least" if budget.goal == "sparsity" else "an increase of at most"
    rows = {"Goal": f"{budget.goal}: {asked} {budget.target:g}"}
    for name, whole in (("one tolerance", budget.uniform), ("by layer", budget.allocated)):
        rows[f"Whole model, {name}"] = (
            f"sparsity {whole.sparsity:.3f}, KL {whole.kl:.5f} nats, perplexity "
            f"{whole.perplexity:.4f} ({whole.dense_perplexity:.4f} dense)"
        )
    if budget.acceptance is not None:
        rows["Accepted"] = describe(budget.acceptance)
    return rows


def _worst(profile: Profile) -> list[dict[str, str]]:
    heads = sorted(_validated(profile), key=lambda named: -_error(named[1]) / named[2])
    return [
        {
            "head": name,
            "error": f"{_error(head):.4f}",
            "over": f"{_error(head) / tolerance:.2f}",
            "sparsity": f"{_sparsity(head):.3f}",
            "tau": f"{head.tau:.4f}",
            "theta": f"{head.theta:.3f}" if head.theta > THETA_OFF else "off",
        }
        for name, head, tolerance in heads[:_WORST]
    ]
