"""One sample of the benchmark: every arm on one text under one seed."""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.domains import Domain
from benchmarks.level_arms.arms import ARMS, USES_DAMAGE, ArmLevel, CountedRuns, Job, Shape
from benchmarks.tuner_arms.samples import begun_at
from vllm_afbs.captures import Capture
from vllm_afbs.cost_models import CpuCost, cost_model
from vllm_afbs.engine.opening import opened
from vllm_afbs.tuning.allocation.analytic import Analytic, measured_damage
from vllm_afbs.tuning.allocation.front import Point, hypervolume
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.cost import AttentionTime, CostModel
from vllm_afbs.tuning.engine import Engine, Model
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
        engine: What runs it, as ``vllm_afbs.tune --engine``.
        lengths: As in ``SearchSettings``.
        tolerance: Likewise.
        cost: Whose time is predicted: ``cpu``, or ``here`` for this machine's GPU.
        unseen: Windows of the measured text.
        seeds: Samples of each text.
    """

    model: str
    engine: str
    lengths: list[int]
    tolerance: float
    cost: Literal["cpu", "here"]
    unseen: int
    seeds: int

    def settings(self, shape: Shape, seed: int) -> SearchSettings:
        """Of a search over blocks of a shape."""
        return SearchSettings(self.lengths, self.tolerance, *shape, seed)

    def cost_model(self, shape: Shape) -> CostModel:
        """Predicts times with blocks of a shape."""
        return CpuCost() if self.cost == "cpu" else cost_model(*shape)


class _Silent:
    def begin(self, stage: str, total: int) -> None:
        print(f"{time.strftime('%H:%M:%S')} {stage}", flush=True)

    def advance(self, units: float) -> None:
        pass


@dataclass(frozen=True)
class Sampled:
    """The model, and what is taken of it for one sample.

    Attributes:
        plan: Everybody's settings.
        seed: The seed.
        model: The model.
        engine: Runs it.
        windows: Token ids by name.
        taken: The layers' Q, K and V.
        folder: Of the journals.
    """

    plan: Plan
    seed: int
    model: Model
    engine: Engine
    windows: dict[str, list[int]]
    taken: Capture
    folder: Path

    def job(self, shape: Shape) -> Job:
        """What arms with blocks of a shape share: curves, damages and readings."""
        settings, layers = self.plan.settings(shape, self.seed), self.taken.layers
        header = {**asdict(self.plan), "shape": list(shape), "windows": list(self.windows)}
        journal = Journal(self.folder / f"journal-{shape[0]}x{shape[1]}.jsonl", header)
        curves = LayerSearches(settings, layers, self.taken, journal, _Silent()).curves()
        sparse_model = self.engine.sparse_model(*shape)
        runs = CountedRuns(lambda: sparse_model, self.windows, journal, lambda: None)
        damage = measured_damage(runs, curves, settings.lengths[0])
        dims = self.model.fingerprint
        attention = AttentionTime(self.plan.cost_model(shape), dims.head_dim, dims.num_heads)
        analytic = Analytic(settings.tolerance, settings.longest, curves, attention, damage)
        return Job(settings, layers, self.taken, analytic, runs, journal)


def sample(
    plan: Plan, domain: Domain, seed: int, names: Sequence[str], work: Path
) -> dict[str, Figures]:
    """Runs arms on one text under one seed, or reads what was kept of an earlier run.

    Args:
        plan: Everybody's settings.
        domain: The text.
        seed: The seed.
        names: The arms; *one tolerance* sets the reference and has to be the first.
        work: Folder of the journals and the captures.
    """
    folder = work / f"{domain.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    header = {**asdict(plan), "texts": [domain.calibration.name, domain.measured.name]}
    results = Journal(folder / "results.jsonl", header)
    if all(f"arm {name}" in results for name in names):
        return {name: results.result(f"arm {name}", Figures) for name in names}
    given = argparse.Namespace(
        engine=plan.engine, model=plan.model, revision=None, hf_overrides=None
    )
    # Pages for the smallest key blocks serve all shapes, so that vLLM starts once.
    block_k = min(ARMS[name].shape[1] for name in names)
    serve = [plan.model, "--max-model-len", str(plan.lengths[-1])]
    figures: dict[str, Figures] = {}
    with opened(given, serve, lambda: block_k) as (model, engine), torch.inference_mode():
        windows = _windows(plan, domain, seed, model.tokenizer())
        cut = {name: tokens for name, tokens in windows.items() if not name.startswith("unseen")}
        taken = capture(model, engine, cut, model.tunable_layers, folder, lambda _: None)
        engine.make_room()
        job_of = cache(Sampled(plan, seed, model, engine, windows, taken, folder).job)
        unseen = [name for name in windows if name.startswith("unseen")]
        base: list[Point] = []
        for name in names:
            arm = ARMS[name]
            job = job_of(arm.shape)
            job.runs.asked.clear()
            begun = len(job.journal.entries(""))
            levels = arm.run(job)
            spent = _spent(name, job.journal, set(job.runs.asked), begun)
            points = [
                Point(each.time_ratio, job.runs.kl(each.thresholds, unseen, plan.lengths[-1]))
                for each in levels
            ]
            base = base or points
            worth = {**_worth(levels, points, base), **spent}
            figures[name] = results.step(f"arm {name}", Figures, partial(dict, worth))
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
