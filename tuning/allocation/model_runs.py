"""Runs of the whole model, sparse against dense; each is a step of the journal."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_afbs.captures import CALIBRATION
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import LayerLevel
from vllm_afbs.profile.tuner_run import WholeModel
from vllm_afbs.tuning.engine import SparseModel
from vllm_afbs.tuning.journal import Result, Steps

Layers = dict[int, LayerLevel]
Thresholds = Mapping[int, HeadThresholds]


@dataclass(frozen=True, eq=False)
class Reading(Result):
    """A run over one window.

    Attributes:
        kl: Mean KL divergence from the dense predictions, in nats.
        loss: Mean negative log likelihood of the tokens that follow, in nats.
        dense_loss: The same of the dense model.
    """

    kl: float
    loss: float
    dense_loss: float


@dataclass(frozen=True, eq=False)
class Damage(Result):
    """What a few sparse layers do to the predictions on the shortest length.

    Attributes:
        kl: KL divergence from the dense model's predictions, in nats.
    """

    kl: float


class ModelRuns:
    """Runs a model whose layers can be made sparse.

    Args:
        load: Loads the model, when it is first needed.
        windows: Token ids by window.
        journal: Where readings are kept.
        on_run: Called after each run that is made or replayed.
        adapter: Digest of the LoRA adapter that the model has, if it has one.
    """

    def __init__(
        self,
        load: Callable[[], SparseModel],
        windows: Mapping[str, Sequence[int]],
        journal: Steps,
        on_run: Callable[[], None],
        adapter: str | None = None,
    ) -> None:
        self._load = load
        self._windows = windows
        self._journal = journal
        self._on_run = on_run
        self._with = "" if adapter is None else f" with {adapter}"

    @cached_property
    def model(self) -> SparseModel:
        """The model, loaded."""
        return self._load()

    def reading(self, thresholds: Thresholds, window: str, length: int) -> Reading:
        """Runs the model over the first ``length`` tokens of a window."""

        def measure() -> Reading:
            compared = self.model.compare(self._windows[window][:length], thresholds)
            return Reading(max(0.0, compared.kl), compared.loss, compared.dense_loss)

        name = self.name_of(thresholds, window, length) + self._with
        reading = self._journal.step(name, Reading, measure)
        self._on_run()
        return reading

    @staticmethod
    def name_of(thresholds: Thresholds, window: str, length: int) -> str:
        """A reading's name in the journal, less its adapter."""
        return f"run {_digest(thresholds)} over {window} to {length}"

    def kl(self, thresholds: Thresholds, windows: Sequence[str], length: int) -> float:
        """Mean divergence over windows, in nats."""
        readings = [self.reading(thresholds, window, length).kl for window in windows]
        return sum(readings) / len(readings)

    def whole_model(self, layers: Layers, windows: Sequence[str], length: int) -> "Runs":
        """What the model does with its layers as the profile has them.

        Args:
            layers: The layers with full attention that were tuned.
            windows: The windows to measure on.
            length: Tokens of each to run.
        """
        thresholds = served_thresholds(layers)
        readings = [self.reading(thresholds, window, length) for window in windows]
        return Runs(layers, readings, windows, length)

    def damage(self, layers: Sequence[int], thresholds: Thresholds, length: int) -> float:
        """KL divergence that some consecutive layers cause on the calibration window, in nats.

        Args:
            layers: Their indices.
            thresholds: Of those that run sparse.
            length: Tokens of the window to run.
        """

        def measure() -> Damage:
            shortest = self._windows[CALIBRATION][:length]
            return Damage(max(0.0, self.model.compare(shortest, thresholds).kl))

        name = f"damage of layers {layers[0]} to {layers[-1]}"
        damage = self._journal.step(name, Damage, measure).kl
        for _ in layers:
            self._on_run()
        return damage


@dataclass(frozen=True)
class Runs:
    """Runs over several windows with layers as the profile has them.

    Attributes:
        layers: The layers.
        readings: Of each window.
        windows: The windows' names.
        length: Tokens of each that were run.
    """

    layers: Layers
    readings: list[Reading]
    windows: Sequence[str]
    length: int

    @property
    def kls(self) -> list[float]:
        """Divergence over each window, in nats."""
        return [each.kl for each in self.readings]

    @property
    def whole(self) -> WholeModel:
        """Their means, for the profile."""
        count = len(self.readings)
        return WholeModel(
            sparsity=mean_sparsity(self.layers),
            kl=sum(self.kls) / count,
            perplexity=math.exp(sum(each.loss for each in self.readings) / count),
            dense_perplexity=math.exp(sum(each.dense_loss for each in self.readings) / count),
        )


def served_thresholds(layers: Layers) -> dict[int, HeadThresholds]:
    """Thresholds of the layers that the server would run sparse."""
    return {
        index: HeadThresholds.of(layer.heads) for index, layer in layers.items() if layer.is_sparse
    }


def mean_sparsity(layers: Layers) -> float:
    """Mean over heads on held-out text; layers that the server leaves dense count as dense."""
    held_out = [
        head.validation.sparsity if layer.is_sparse and head.validation is not None else 0.0
        for layer in layers.values()
        for head in layer.heads
    ]
    return sum(held_out) / len(held_out)


def _digest(thresholds: Thresholds) -> str:
    plain = {layer: (each.tau.tolist(), each.theta.tolist()) for layer, each in thresholds.items()}
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()[:16]
