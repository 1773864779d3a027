"""Our search, and the same with a part taken out.

All but one end in the same validation on held-out text as ``vllm_afbs.tune``, which also repairs
what a taken-out part would have done better: an ablation shows in the sparsity as well as in the
errors.

- *without BO*: no guard is tried, so theta stays off.
- *without binary search*: each head keeps the tau that its last trial read off a line.
- *without validation*: what stage 2 found is taken, as the arms that only sweep do.
- *without low fidelity*: every trial has all rows. The search needs two lengths, so the shorter is
  one query block below the longest, and all short ones are gone.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.tuner_arms.arms import Arm, Found, by_layer
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import HeadProfile
from vllm_afbs.tuning.capture import Capture
from vllm_afbs.tuning.journal import FILE_NAME, Journal, Record, read_steps
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.explore import Explorer
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.search.validation import MIN_SPARSITY
from vllm_afbs.tuning.windows import CALIBRATION


def searched(
    search_type: type[LayerSearch],
    adapt: Callable[[SearchSettings], SearchSettings] = lambda settings: settings,
) -> Arm:
    """The arm that a search in stages makes.

    Args:
        search_type: The search.
        adapt: Its own settings, of everybody's.
    """

    def tune(settings: SearchSettings, layer: int, capture: Capture) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE_NAME
            journal = Journal(path, {})
            heads = search_type(adapt(settings), layer, capture, journal, lambda _: None).run()
            steps = read_steps(path)
        found = HeadThresholds.of(heads.heads)
        validation = sum(s["evaluations"] for s in steps if s["step"].endswith(" validate"))
        spent = journal.total("evaluations"), journal.total("cost")
        return Found(found.tau, found.theta, *spent, float(validation))

    return by_layer(tune)


class _NoGuards(Explorer):
    """Stage 1 up to the first guard."""

    def run(self) -> Record:
        for length in self._settings.lengths:
            compute = partial(self._without_guard, length)
            self._free[length] = self._trial(f"unguarded {length}", compute)
        free = self._free[self._settings.longest]
        return {name: free[name] for name in ("theta", "tau", "slope", "sparsity")}


class WithoutBayes(LayerSearch):
    """No Bayesian optimisation, so no guards."""

    def _explore(self) -> Record:
        return _NoGuards(
            self._settings, self._layer, self._scorer, self._step, lambda _: None
        ).run()


class WithoutBinarySearch(LayerSearch):
    """No refinement of tau."""

    def _refine(self, explored: Record) -> Record:
        # Where the trials' lines say that the tolerance is met; nothing is measured.
        error = [self._settings.tolerance] * len(explored["tau"])
        return {name: explored[name] for name in ("theta", "tau", "sparsity")} | {"error": error}


class WithoutValidation(LayerSearch):
    """No held-out text."""

    def _validate(self, refined: Record, settings: SearchSettings) -> Record:
        worth = [sparsity >= MIN_SPARSITY for sparsity in refined["sparsity"]]
        tau = [tau if each else 1.0 for tau, each in zip(refined["tau"], worth, strict=True)]
        theta = (min(1.0, each) for each in refined["theta"])
        heads = [HeadProfile(tau=t, theta=g) for t, g in zip(tau, theta, strict=True)]
        return {"heads": [head.model_dump() for head in heads]}


class _AllRows(Explorer):
    """Stage 1 with all rows in every trial."""

    def _evaluator(self, length: int) -> LayerEvaluator:
        return self._scorer.evaluator(CALIBRATION, length, None)


class WithoutLowFidelity(LayerSearch):
    """No fewer rows; the lengths are ``nearly_longest``."""

    def _explore(self) -> Record:
        return _AllRows(self._settings, self._layer, self._scorer, self._step, lambda _: None).run()


def nearly_longest(settings: SearchSettings) -> SearchSettings:
    """The longest length, and a shorter one for form's sake."""
    return replace(settings, lengths=[settings.longest - settings.block_q, settings.longest])
