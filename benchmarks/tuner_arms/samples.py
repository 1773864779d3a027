"""One sample of the benchmark: every arm on one text under one seed."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.domains import Domain
from benchmarks.theta_tuner.layer import ThetaLayerSearch
from benchmarks.tuner_arms import per_head, stages, sweeps
from benchmarks.tuner_arms.arms import Arm, Found, HeadCapture, swept
from benchmarks.tuner_arms.unseen import Choice, Meter
from vllm_afbs.captures import Capture
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import SourceModel, open_model
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.journal import Journal
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import Text
from vllm_afbs.tuning.windows import cut_windows

BLOCK = 128

ON_ALL_LAYERS: dict[str, Arm] = {
    "afbs": stages.curved,
    "theta trials": stages.searched(ThetaLayerSearch),
    "theta trials without BO": stages.searched(stages.WithoutBayes),
    "theta trials without validation": stages.searched(stages.WithoutValidation),
    "theta trials without binary search": stages.searched(stages.WithoutBinarySearch),
    "theta trials without low fidelity": stages.searched(
        stages.WithoutLowFidelity, stages.nearly_longest
    ),
    "one setting": sweeps.one_setting,
    "random": swept(sweeps.random_search),
    "grid": swept(sweeps.grid),
    "spargeattn": swept(sweeps.spargeattn),
}
ON_SOME_LAYERS: dict[str, Arm] = {"oracle": swept(sweeps.oracle)}
ON_SOME_HEADS: dict[str, Arm] = {
    "single-fidelity BO": swept(per_head.single_fidelity),
    "paper literal": stages.searched(per_head.PaperSearch),
}
ARMS = [*ON_ALL_LAYERS, *ON_SOME_LAYERS, *ON_SOME_HEADS]


Head = tuple[int, int]  # layer, number
GroupFigures = dict[str, dict[str, float]]
"""Of each group of heads that an arm tuned all of, its ``figures``."""


@dataclass(frozen=True)
class Scope:
    """Which heads are tuned.

    Attributes:
        layers: By the arms for every layer.
        num_heads: Of a layer.
        slow: By the arms that take long: one head of each of some layers.
    """

    layers: list[int]
    num_heads: int
    slow: list[Head]

    @classmethod
    def of(cls, model: SourceModel, every: int, num_slow: int) -> "Scope":
        """Every n-th layer; the slow ones spread over them, and over the heads."""
        shape = model.fingerprint
        layers = list(range(0, shape.num_layers, every))
        count = min(num_slow, len(layers))
        slow = [
            (layers[(2 * i + 1) * len(layers) // (2 * count)], i * shape.num_heads // count)
            for i in range(count)
        ]
        return cls(layers, shape.num_heads, slow)

    @property
    def slow_layers(self) -> list[int]:
        """The layers of the slow heads."""
        return [layer for layer, _ in self.slow]

    def groups(self) -> dict[str, set[Head]]:
        """Heads whose means are reported, by what they are called."""

        def of(layers: Sequence[int]) -> set[Head]:
            return {(layer, head) for layer in layers for head in range(self.num_heads)}

        groups = [of(self.layers), of(self.slow_layers), set(self.slow)]
        return {f"{len(heads)} heads": heads for heads in groups if heads}


@dataclass(frozen=True)
class Plan:
    """What a sample depends on besides its text and seed.

    Attributes:
        model: The model's directory.
        lengths: As in ``SearchSettings``.
        tolerance: Likewise.
        every: Take every n-th layer.
        num_slow: Heads of the slow arms.
        seeds: Samples of each text.
    """

    model: str
    lengths: list[int]
    tolerance: float
    every: int
    num_slow: int
    seeds: int

    def settings(self, seed: int) -> SearchSettings:
        """A sample's settings."""
        return SearchSettings(self.lengths, self.tolerance, BLOCK, BLOCK, seed)


def choose(name: str, settings: SearchSettings, scope: Scope, taken: Capture) -> list[Choice]:
    """Runs an arm on the heads that it is for."""
    choices = []
    if name in ON_SOME_HEADS:
        for layer, head in scope.slow:
            one = HeadCapture(taken.directory, taken.layers, taken.held_out, head)
            (found,) = ON_SOME_HEADS[name](settings, [layer], one)
            choices += _choices(layer, [head], found)
        return choices
    layers = scope.layers if name in ON_ALL_LAYERS else scope.slow_layers
    arm = (ON_ALL_LAYERS | ON_SOME_LAYERS)[name]
    for layer, found in zip(layers, arm(settings, layers, taken), strict=True):
        choices += _choices(layer, range(scope.num_heads), found)
    return choices


def _choices(layer: int, heads: Sequence[int], found: Found) -> list[Choice]:
    spent = [each / len(heads) for each in (found.evaluations, found.cost, found.validation)]
    return [
        Choice(layer, head, float(tau), float(theta), *spent)
        for head, tau, theta in zip(heads, found.tau, found.theta, strict=True)
    ]


def figures(choices: Sequence[Choice], seen: Meter, unseen: Meter) -> dict[str, float]:
    """What choices cost and are worth, as means over their heads."""
    worth, matched = unseen.worth(choices), unseen.at_tolerance(choices)
    return {
        "evaluations a head": fmean(each.evaluations for each in choices),
        "evaluations a head without validation": fmean(
            each.evaluations - each.validation for each in choices
        ),
        "cost a head": fmean(each.cost for each in choices),
        "mean sparsity on calibration text": seen.sparsity(choices),
        "mean error on unseen text": worth.error,
        "mean sparsity on unseen text": worth.sparsity,
        "sparsity at equal error": matched.sparsity,
        "error there": matched.error,
    }


@contextmanager
def captured(plan: Plan, file: Path, seed: int) -> Iterator[Capture]:
    """A text's tensors, the text begun at the seed's place in it; gone at the end."""
    model = open_model(plan.model)
    text = begun_at(seed / plan.seeds, file.read_text(encoding="utf-8"))
    cut = cut_windows(model.tokenizer(), [Text(file.name, text)], plan.lengths[-1])
    layers = range(model.fingerprint.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        yield capture(
            model, TransformersEngine(model), cut.windows, layers, Path(folder), lambda _: None
        )


def begun_at(share: float, text: str) -> str:
    """The text from a paragraph on, and what came before it at its end."""
    start = max(0, text.find("\n\n", int(share * len(text)))) if share else 0
    return text[start:] + "\n\n" + text[:start]


def sample(
    plan: Plan, domain: Domain, seed: int, names: Sequence[str], work: Path
) -> dict[str, GroupFigures]:
    """Runs arms on one text under one seed, or reads what was kept of an earlier run.

    Args:
        plan: Everybody's settings.
        domain: The text.
        seed: The seed.
        names: The arms.
        work: Folder of the journals, one for each sample; an arm is a step.

    Returns:
        For each arm its ``figures`` of each group of heads that it tuned all of.
    """
    header = {**asdict(plan), "texts": [domain.calibration.name, domain.measured.name]}
    journal = Journal(work / f"{domain.name}-{seed}.jsonl", header)
    if all(name in journal for name in names):
        return {name: journal.result(name, GroupFigures) for name in names}
    scope = Scope.of(open_model(plan.model), plan.every, plan.num_slow)
    settings = plan.settings(seed)
    with (
        captured(plan, domain.calibration, seed) as taken,
        captured(plan, domain.measured, seed) as hidden,
        torch.inference_mode(),
    ):
        meters = Meter(settings, taken), Meter(settings, hidden)
        records = {}
        for name in names:
            begun = time.monotonic()
            compute = partial(_figures, name, settings, scope, taken, meters)
            records[name] = journal.step(name, GroupFigures, compute)
            seconds = time.monotonic() - begun
            print(f"{domain.name}, seed {seed}, {name}: {seconds:.0f} s", flush=True)
    return records


def _figures(
    name: str, settings: SearchSettings, scope: Scope, taken: Capture, meters: tuple[Meter, Meter]
) -> GroupFigures:
    choices = choose(name, settings, scope, taken)
    tuned = {(choice.layer, choice.head) for choice in choices}
    return {
        group: figures([each for each in choices if (each.layer, each.head) in heads], *meters)
        for group, heads in scope.groups().items()
        if heads <= tuned
    }
