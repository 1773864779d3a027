"""One sample of the benchmark: every arm on one text under one seed."""

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.domains import Domain
from benchmarks.level_arms.arms import ARMS, USES_DAMAGE, ArmLevel, Job
from benchmarks.tuner_arms.samples import begun_at
from vllm_afbs.cost_models import cost_model
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.allocation.analytic import Analytic, measured_damage
from vllm_afbs.tuning.allocation.front import Point, hypervolume
from vllm_afbs.tuning.allocation.model_runs import ModelRuns, Reading, Thresholds
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.cost import AttentionTime
from vllm_afbs.tuning.journal import Journal, Steps
from vllm_afbs.tuning.run import LayerSearches
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import Text
from vllm_afbs.tuning.windows import cut_windows

Figures = dict[str, float]
"""What an arm cost and is worth, by name."""
_WORST_KL = 2.0
"""The reference's divergence, over that of the fastest level of one tolerance."""


@dataclass(frozen=True)
class Plan:
    """What a sample depends on besides its text and seed.

    Attributes:
        model: The model's directory.
        lengths: As in ``SearchSettings``.
        tolerance: Likewise.
        block: Sides of a block.
        unseen: Windows of the measured text.
        seeds: Samples of each text.
    """

    model: str
    lengths: list[int]
    tolerance: float
    block: int
    unseen: int
    seeds: int


class CountedRuns(ModelRuns):
    """Runs that an arm asked for, whoever made them first."""

    asked: set[str]

    def reading(self, thresholds: Thresholds, window: str, length: int) -> Reading:
        """See ``ModelRuns``."""
        found = super().reading(thresholds, window, length)
        self.asked.add(self.name_of(thresholds, window, length))
        return found


class _Silent:
    def begin(self, stage: str, total: int) -> None:
        print(f"{time.strftime('%H:%M:%S')} {stage}", flush=True)

    def advance(self, units: float) -> None:
        pass


def sample(
    plan: Plan, domain: Domain, seed: int, names: Sequence[str], work: Path
) -> dict[str, Figures]:
    """Runs arms on one text under one seed, or reads what was kept of an earlier run.

    Args:
        plan: Everybody's settings.
        domain: The text.
        seed: The seed.
        names: The arms; *one tolerance* sets the reference and has to be the first.
        work: Folder of the journal and the captures.
    """
    settings = SearchSettings(plan.lengths, plan.tolerance, plan.block, plan.block, seed)
    folder = work / f"{domain.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    header = {**asdict(plan), "texts": [domain.calibration.name, domain.measured.name]}
    journal = Journal(folder / "journal.jsonl", header)
    if all(f"arm {name}" in journal for name in names):
        return {name: journal.result(f"arm {name}", Figures) for name in names}
    model = open_model(plan.model)
    windows = _windows(plan, domain, seed, model.tokenizer())
    engine, layers = TransformersEngine(model), range(model.fingerprint.num_layers)
    cut = {name: tokens for name, tokens in windows.items() if not name.startswith("unseen")}
    taken = capture(model, engine, cut, layers, folder, lambda _: None)
    unseen = [name for name in windows if name.startswith("unseen")]
    shape, figures = model.fingerprint, {}
    with torch.inference_mode():
        curves = LayerSearches(settings, layers, taken, journal, _Silent()).curves()
        sparse_model = engine.sparse_model(plan.block, plan.block)
        runs = CountedRuns(lambda: sparse_model, windows, journal, lambda: None)
        runs.asked = set()
        damage = measured_damage(runs, curves, settings.lengths[0])
        attention = AttentionTime(
            cost_model(plan.block, plan.block), shape.head_dim, shape.num_heads
        )
        analytic = Analytic(plan.tolerance, settings.longest, curves, attention, damage)
        base: list[Point] = []
        for name in names:
            runs.asked = set()
            begun = len(journal.entries(""))
            levels = ARMS[name](Job(settings, layers, taken, analytic, runs, journal))
            spent = _spent(name, journal, set(runs.asked), begun)
            points = [
                Point(each.time_ratio, runs.kl(each.thresholds, unseen, settings.longest))
                for each in levels
            ]
            base = base or points
            worth = {**_worth(levels, points, base), **spent}
            figures[name] = journal.step(f"arm {name}", Figures, partial(dict, worth))
            print(time.strftime("%H:%M:%S"), domain.name, seed, name, figures[name], flush=True)
    return figures


def _spent(name: str, journal: Steps, asked: set[str], begun: int) -> Figures:
    """Runs of the model and seconds; a run that an arm before had made counts again."""
    entries = {entry.step: entry for entry in journal.entries("")}
    own = list(entries.values())[begun:]
    steps = {entry.step for entry in own} | asked
    steps |= {step for step in entries if step.startswith(("layer ",))}
    damages = {step for step in entries if step.startswith("damage")}
    if name in USES_DAMAGE:
        steps |= damages
    in_ax = [entry.seconds for entry in own if entry.kind == "Proposal"]
    return {
        "model runs": float(len(asked) + (len(damages) if name in USES_DAMAGE else 0)),
        "seconds": sum(entries[step].seconds for step in steps),
        "seconds in the optimiser": sum(in_ax),
    }


def _worth(levels: Sequence[ArmLevel], points: Sequence[Point], base: Sequence[Point]) -> Figures:
    reference = Point(1.0, _WORST_KL * max(point.kl for point in base))
    middle = base[len(base) // 2].kl
    found = {
        "hypervolume": hypervolume(points, reference),
        "share of winners that the model proposed": (
            sum(each.proposed for each in levels) / len(levels)
        ),
    }
    for what, values in (
        ("sparsity at equal KL", [each.sparsity for each in levels]),
        ("time at equal KL", [point.time_ratio for point in points]),
    ):
        if (value := at_kl([point.kl for point in points], values, middle)) is not None:
            found[what] = value
    return found


def at_kl(kls: Sequence[float], values: Sequence[float], kl: float) -> float | None:
    """A value at a divergence, on the line between two levels; None outside of them."""
    points = sorted(
        (math.log(max(each, 1e-12)), value) for each, value in zip(kls, values, strict=True)
    )
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= math.log(kl) <= high:
            share = (math.log(kl) - low) / max(high - low, 1e-12)
            return below + (above - below) * share
    return None


def _windows(plan: Plan, domain: Domain, seed: int, tokenizer: Any) -> dict[str, list[int]]:
    """The calibration text's windows, and the measured text's as ``unseen-0`` and so on."""
    share, longest = seed / plan.seeds, plan.lengths[-1]
    seen = begun_at(share, domain.calibration.read_text(encoding="utf-8"))
    cut = cut_windows(tokenizer, [Text(domain.calibration.name, seen)], longest)
    ids = tokenizer(domain.measured.read_text(encoding="utf-8"), verbose=False).input_ids
    room = len(ids) - longest
    places = [int(room * ((index + share) / plan.unseen)) for index in range(plan.unseen)]
    unseen = {f"unseen-{i}": ids[at : at + longest] for i, at in enumerate(places)}
    return {**cut.windows, **unseen}
