"""The arms: each ends in levels, which are thresholds with a predicted time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.theta_tuner.layer import ThetaLayerSearch
from benchmarks.tuner_arms import sweeps
from benchmarks.tuner_arms.arms import Found as LayerFound
from benchmarks.tuner_arms.arms import HeadCapture
from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import MIN_LAYER_SPARSITY
from vllm_afbs.tuning.allocation.analytic import Analytic
from vllm_afbs.tuning.allocation.front import front
from vllm_afbs.tuning.allocation.front_search import (
    OVERALL,
    Fidelity,
    FrontSearch,
    Proposer,
    thresholds_of,
)
from vllm_afbs.tuning.allocation.model_runs import ModelRuns, Reading, Thresholds
from vllm_afbs.tuning.journal import Result, Steps
from vllm_afbs.tuning.search.layer import CURVE_Q_BLOCKS
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

OTHER_FACTORS = (0.5, 1.0, 2.0)
"""Tolerances of the tuners that know one only, in units of the job's."""


Shape = tuple[int, int]
"""Rows of a query block and keys of a key block."""
TODAY: Shape = (128, 64)
BEFORE: Shape = (128, 128)
"""Blocks of the tuner before levels."""


class CountedRuns(ModelRuns):
    """Runs that an arm asked for, whoever made them first."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def reading(self, thresholds: Thresholds, window: str, length: int) -> Reading:
        """See ``ModelRuns``."""
        found = super().reading(thresholds, window, length)
        self.asked.add(self.name_of(thresholds, window, length))
        return found


@dataclass(frozen=True)
class ArmLevel:
    """A level that an arm ended in.

    Attributes:
        thresholds: Of the layers that run sparse.
        time_ratio: Predicted time of attention over that of dense attention.
        sparsity: Mean over heads on the calibration text.
        proposed: Whether an optimiser's model proposed it.
    """

    thresholds: Thresholds
    time_ratio: float
    sparsity: float
    proposed: bool = False


@dataclass(frozen=True)
class Job:
    """What the arms with blocks of one shape have.

    Attributes:
        settings: The search's settings.
        layers: The tuned layers.
        taken: Their Q, K and V.
        analytic: Divides the error, and predicts times.
        runs: Runs the model, and counts for the arm.
        journal: The arm's steps.
    """

    settings: SearchSettings
    layers: Sequence[int]
    taken: Capture
    analytic: Analytic
    runs: CountedRuns
    journal: Steps


@dataclass(frozen=True)
class Arm:
    """A way to levels.

    Attributes:
        run: Takes it.
        shape: Of its blocks.
    """

    run: Callable[[Job], list[ArmLevel]]
    shape: Shape = TODAY


def _one_tolerance(job: Job) -> list[ArmLevel]:
    return [_level(job, job.analytic.one_tolerance(2.0**overall)) for overall in OVERALL]


def _analytic(job: Job) -> list[ArmLevel]:
    return [_level(job, job.analytic.divided(2.0**overall)) for overall in OVERALL]


def _shrunk(job: Job) -> list[ArmLevel]:
    """The analytic divisions with damages nearer to each other, as if they were half noise."""
    damage = job.analytic.damage
    middle = damage.log().mean().exp()
    own = replace(job, analytic=replace(job.analytic, damage=(damage * middle).sqrt()))
    return _analytic(own)


def _searched(job: Job, proposer: Proposer, around: str, low_fidelity: bool) -> list[ArmLevel]:
    lengths, held_out = job.settings.lengths, job.taken.held_out
    high = Fidelity(held_out, lengths[-1])
    low = Fidelity(held_out[:1], lengths[-2]) if low_fidelity else high
    base = job.analytic.divided if around == "analytic" else job.analytic.one_tolerance
    name = f"{proposer} {around} {low_fidelity}"
    found = FrontSearch(
        job.analytic, base, job.runs, (low, high), job.journal, job.settings.seed, proposer, name
    ).run()
    best = [found[index] for index in front([each.point for each in found])]
    return [_level(job, each.division, each.source == "model") for each in best]


def _level(job: Job, division: Mapping[int, float], proposed: bool = False) -> ArmLevel:
    analytic, plain = job.analytic, dict(division)
    sparsities = [
        float(analytic.curves[layer].longest.sparsity_at(analytic.curves[layer].depth(each)).mean())
        if analytic.is_sparse(layer, each)
        else 0.0
        for layer, each in plain.items()
    ]
    return ArmLevel(
        thresholds_of(analytic, plain),
        analytic.time_ratio(plain),
        sum(sparsities) / len(sparsities),
        proposed,
    )


@dataclass(frozen=True, eq=False)
class Taus(Result):
    """What another tuner chose for a layer: tau and theta by head."""

    tau: tuple[float, ...]
    theta: tuple[float, ...]


def _other(
    job: Job, name: str, tune: Callable[[SearchSettings, int], HeadThresholds]
) -> list[ArmLevel]:
    levels = []
    for factor in OTHER_FACTORS:
        settings = SearchSettings(
            job.settings.lengths, job.settings.tolerance * factor, job.settings.block_q,
            job.settings.block_k, job.settings.seed,
        )  # fmt: skip
        thresholds, densities = {}, []
        for layer in job.layers:

            def compute(layer: int = layer, settings: SearchSettings = settings) -> Taus:
                found = tune(settings, layer)
                return Taus(tuple(found.tau.tolist()), tuple(found.theta.tolist()))

            taus = job.journal.step(f"{name} {factor} layer {layer}", Taus, compute)
            own = HeadThresholds(torch.tensor(taus.tau), torch.tensor(taus.theta))
            evaluator = LayerScorer(settings, layer, job.taken).evaluator(
                CALIBRATION, settings.longest, CURVE_Q_BLOCKS
            )
            sparsity = evaluator.sparsity(own).masked_fill(own.tau >= 1.0, 0.0).mean()
            if float(sparsity) >= MIN_LAYER_SPARSITY:
                thresholds[layer] = own
                densities.append(1.0 - float(sparsity))
            else:
                densities.append(1.0)
        ratio = job.analytic.time.ratio(settings.longest, densities)
        levels.append(ArmLevel(thresholds, ratio, 1.0 - sum(densities) / len(densities)))
    return levels


def _theta_trials(job: Job) -> list[ArmLevel]:
    def tune(settings: SearchSettings, layer: int) -> HeadThresholds:
        steps = Steps([], lambda _: None)
        heads = ThetaLayerSearch(settings, layer, job.taken, steps, lambda _: None).run().heads
        return HeadThresholds.of(heads)

    return _other(job, "theta trials", tune)


def _spargeattn(job: Job) -> list[ArmLevel]:
    def tune(settings: SearchSettings, layer: int) -> HeadThresholds:
        found = sweeps.spargeattn(LayerScorer(settings, layer, job.taken), settings)
        return HeadThresholds(found.tau, found.theta)

    return _other(job, "spargeattn", tune)


def _paper(job: Job) -> list[ArmLevel]:
    from benchmarks.tuner_arms import per_head, stages

    tune_layer = stages.searched(per_head.PaperSearch)
    num_heads = job.analytic.time.num_heads

    def tune(settings: SearchSettings, layer: int) -> HeadThresholds:
        found: list[LayerFound] = []
        for head in range(num_heads):
            taken = HeadCapture(job.taken.directory, job.taken.layers, job.taken.held_out, head)
            found += tune_layer(settings, [layer], taken)
        return HeadThresholds(
            torch.cat([each.tau for each in found]), torch.cat([each.theta for each in found])
        )

    return _other(job, "paper literal", tune)


def _around(proposer: Proposer, around: str = "analytic", low_fidelity: bool = True) -> Arm:
    return Arm(partial(_searched, proposer=proposer, around=around, low_fidelity=low_fidelity))


ARMS: dict[str, Arm] = {
    "one tolerance": Arm(_one_tolerance),
    "analytic": Arm(_analytic),
    "analytic, shrunk": Arm(_shrunk),
    "one tolerance, key blocks of 128": Arm(_one_tolerance, BEFORE),
    "analytic, key blocks of 128": Arm(_analytic, BEFORE),
    "ax around analytic": _around("ax"),
    "random around analytic": _around("random"),
    "coordinate around analytic": _around("coordinate"),
    "ax from one tolerance": _around("ax", "one tolerance"),
    "random from one tolerance": _around("random", "one tolerance"),
    "ax without low fidelity": _around("ax", low_fidelity=False),
    "ax with one objective": _around("ax, one objective"),
    "theta trials": Arm(_theta_trials, BEFORE),
    "spargeattn": Arm(_spargeattn),
    "paper literal": Arm(_paper),
}
SLOW = ("paper literal",)
"""Arms that run only if they are named."""
USES_DAMAGE = tuple(name for name in ARMS if "analytic" in name or name.startswith("ax w"))
"""Arms that need one run of the model per layer."""
