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
from vllm_afbs.profile.adapters import describe_adapters
from vllm_afbs.profile.schema import HeadProfile, Profile
from vllm_afbs.tuning.allocation.acceptance import describe
from vllm_afbs.tuning.allocation.analytic import FACTORS
from vllm_afbs.tuning.allocation.model_runs import Damage
from vllm_afbs.tuning.journal import Entry
from vllm_afbs.tuning.level_rows import level_rows, measured_at
from vllm_afbs.tuning.search.curve import Curve

_STEP = re.compile(r"layer (?P<layer>\d+) (?P<stage>[a-z]+)")
_CURVE = re.compile(r"layer \d+ curve")
_DAMAGE = re.compile(r"damage of layers (?P<first>\d+) to (?P<last>\d+)")
_TEMPLATE = "report.html.j2"
_WORST = 10
_SPENT = ("evaluations", "cost", "seconds")
Matrix = list[list[float | None]]


def write_report(profile: Profile, steps: Sequence[Entry], path: Path) -> None:
    """Writes a profile's report.

    Args:
        profile: The profile.
        steps: The job's journal, in its order. Without steps, the report leaves out curves and
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
        levels=level_rows(profile),
        worst=_worst(profile),
    )
    write_atomically(path, page)


def _html(figure: go.Figure, identifier: str) -> str:
    figure.update_layout(template="simple_white", height=460, margin={"t": 20})
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=identifier))


def _figures(profile: Profile, steps: Sequence[Entry]) -> Iterable[tuple[str, str, go.Figure]]:
    longest = profile.max_seq_len
    yield (
        "What each level costs and gains",
        "Predicted time of prefill attention over that of dense attention, by prompt length, and "
        "how far the model's predictions diverge from the dense model's.",
        _levels(profile),
    )
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
        "Tolerance by layer",
        "Each layer's tolerance at the default level, what it skips with it on held-out text, and "
        "its share of the damage (KL divergence with it alone sparse at the job's tolerance, over "
        "the sum of all layers; of deep models, consecutive layers are measured together).",
        _budget(profile, steps),
    )
    if steps:
        yield (
            "Sparsity by tolerance",
            "What heads skip at the longest length on the calibration text, mean over layers: the "
            "curves that levels are read off.",
            _curves(profile, steps),
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
        layer: step.read(Damage).kl / (int(match["last"]) + 1 - int(match["first"]))
        for step in steps
        if (match := _DAMAGE.fullmatch(step.step))
        for layer in range(int(match["first"]), int(match["last"]) + 1)
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


def _levels(profile: Profile) -> go.Figure:
    figure = go.Figure()
    levels = [level for level in profile.levels if level.whole_model is not None]
    for length in dict.fromkeys(each.length for level in levels for each in level.by_length):
        found = {
            level.name: (level.whole_model.kl, each.attention_time_ratio)
            for level in levels
            for each in level.by_length
            if level.whole_model is not None and each.length == length
        }
        figure.add_scatter(
            x=[kl for kl, _ in found.values()],
            y=[ratio for _, ratio in found.values()],
            text=list(found),
            mode="lines+markers+text",
            textposition="top center",
            name=f"{length} tokens",
        )
    return figure.update_layout(
        xaxis_title=f"KL divergence at {measured_at(profile)} tokens, nats",
        xaxis_type="log",
        yaxis_title="predicted time over dense",
    )


def _curves(profile: Profile, steps: Sequence[Entry]) -> go.Figure:
    curves = [step.read(Curve) for step in steps if _CURVE.fullmatch(step.step)]
    tolerances = [profile.tuner.tolerance * factor for factor in FACTORS]
    means = [
        sum(float(curve.sparsity_at(curve.read(each)).mean()) for curve in curves) / len(curves)
        for each in tolerances
    ]
    figure = go.Figure(go.Scatter(x=tolerances, y=means, mode="lines+markers"))
    return figure.update_layout(
        xaxis_title="tolerance, relative L1", xaxis_type="log", yaxis_title="mean sparsity"
    )


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
        "Default level": profile.default_level,
        **_layers(profile),
        **_adapters(profile),
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


def _adapters(profile: Profile) -> dict[str, str]:
    if not profile.adapters:
        return {}
    names = [level.name for level in profile.levels]
    return {"LoRA adapters": describe_adapters(profile.adapters, names)}


def _whole_model(profile: Profile) -> dict[str, str]:
    budget = profile.tuner.budget
    if budget is None:
        return {}
    asked = {
        "sparsity": "at least",
        "speedup": "at least",
        "perplexity": "an increase of at most",
        "kl": "at most",
    }[budget.goal]
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
