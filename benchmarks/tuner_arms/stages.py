"""Our search, and the one before it with a part taken out.

- *afbs*: what ``vllm_afbs.tune`` runs for every layer (``tuning.search.layer``).
- *theta trials*: the tuner before (``benchmarks.theta_tuner``), and that without a part.

All but one end in the same validation on held-out text as ``vllm_afbs.tune``, which also repairs
what a taken-out part would have done better: an ablation shows in the sparsity as well as in the
errors.

- *without BO*: no theta is tried, so theta stays off.
- *without binary search*: each head keeps the tau that its last trial read off a line.
- *without validation*: what stage 2 found is taken, as the arms that only sweep do.
- *without low fidelity*: every trial has all rows. The search needs two lengths, so the shorter is
  one query block below the longest, and all short ones are gone.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.theta_tuner.explore import Explorer
from benchmarks.theta_tuner.layer import ThetaLayerSearch
from benchmarks.theta_tuner.results import Explored, Refined, Validated
from benchmarks.tuner_arms.arms import Arm, Found, by_layer
from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import HeadProfile
from vllm_afbs.tuning.journal import FILE_NAME, Journal, Steps
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings


def searched(
    search_type: type[ThetaLayerSearch],
    adapt: Callable[[SearchSettings], SearchSettings] = lambda settings: settings,
) -> Arm:
    """The arm that a search in stages makes.

    Args:
        search_type: The search.
        adapt: Its own settings, of everybody's.
    """

    def tune(settings: SearchSettings, layer: int, capture: Capture) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / FILE_NAME, {})
            heads = search_type(adapt(settings), layer, capture, journal, lambda _: None).run()
        found = HeadThresholds.of(heads.heads)
        done = journal.entries(f"layer {layer} validate")
        validation = sum(entry.evaluations for entry in done)
        spent = journal.total("evaluations"), journal.total("cost")
        return Found(found.tau, found.theta, *spent, float(validation))

    return by_layer(tune)


def _curved(settings: SearchSettings, layer: int, capture: Capture) -> Found:
    journal = Steps([], lambda _: None)
    search = LayerSearch(settings, layer, capture, journal, lambda _: None)
    found = HeadThresholds.of(search.settled([settings.tolerance])[settings.tolerance])
    validation = journal.entry(f"layer {layer} held out").evaluations
    spent = journal.total("evaluations"), journal.total("cost")
    return Found(found.tau, found.theta, *spent, float(validation))


curved = by_layer(_curved)
"""The product's search, at the job's tolerance; what it spends is for all tolerances."""


class _WithoutTheta(Explorer):
    """Stage 1 up to the first theta trial."""

    def run(self) -> Explored:
        self._run_without_theta()
        trial = self.without_theta(self._settings.longest)
        return Explored(best=trial, without_theta=trial)


class WithoutBayes(ThetaLayerSearch):
    """No Bayesian optimisation, so no theta."""

    def _explore(self) -> Explored:
        return _WithoutTheta(
            self._settings, self._layer, self._scorer, self._step, lambda _: None
        ).run()


class WithoutBinarySearch(ThetaLayerSearch):
    """No refinement of tau."""

    def _refine(self, explored: Explored) -> Refined:
        best = explored.best
        # Where the trials' lines say that the tolerance is met; nothing is measured.
        error = torch.full_like(best.sparsity, self._settings.tolerance, dtype=torch.float64)
        return Refined(best.theta, best.tau, best.slope, best.sparsity.double(), error=error)


class WithoutValidation(ThetaLayerSearch):
    """No held-out text."""

    def _validate(self, refined: Refined, settings: SearchSettings) -> Validated:
        tau = torch.where(refined.sparsity >= MIN_SPARSITY, refined.tau, 1.0).tolist()
        pairs = zip(tau, refined.theta.clamp_max(1.0).tolist(), strict=True)
        return Validated(tuple(HeadProfile(tau=tau, theta=theta) for tau, theta in pairs))


class _AllRows(Explorer):
    """Stage 1 with all rows in every trial."""

    def _evaluator(self, length: int) -> LayerEvaluator:
        return self._scorer.evaluator(CALIBRATION, length, None)


class WithoutLowFidelity(ThetaLayerSearch):
    """No fewer rows; the lengths are ``nearly_longest``."""

    def _explore(self) -> Explored:
        return _AllRows(self._settings, self._layer, self._scorer, self._step, lambda _: None).run()


def nearly_longest(settings: SearchSettings) -> SearchSettings:
    """The longest length, and a shorter one for form's sake."""
    return replace(settings, lengths=[settings.longest - settings.block_q, settings.longest])
