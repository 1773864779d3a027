"""Arms with an optimiser of their own for each head.

A step of Ax takes a second, whatever it optimises, so these are run on few heads.

- *single-fidelity BO*: what a user would write: Ax's public interface, tau and theta as
  parameters, the sparsity to maximise and the tolerance as a constraint, at the longest length.
- *paper literal*: the paper's algorithm (AFBS-BO) read to the letter, for each head: Bayesian
  optimisation of the coupled parameters on the shortest length, then binary search on tau, theta
  kept, at the longest, then validation, by the same rules as ours. The paper gives no budget that
  could be taken over; these are ours.

tau is a parameter on the scale of log(1 - tau), on which log error is near a line, between the
same bounds as in the other arms: as kind as to our own search.
"""

import logging
import math
from collections.abc import Callable

import torch

from benchmarks.theta_tuner.layer import ThetaLayerSearch
from benchmarks.theta_tuner.results import Candidate, Explored, Refined
from benchmarks.tuner_arms.arms import Best
from benchmarks.tuner_arms.sweeps import LEAST_DEPTH, MOST_DEPTH
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, START_SLOPE, tau_of
from vllm_afbs.tuning.search.evaluator import HeadScores
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

SINGLE_TRIALS = 20
PAPER_TRIALS = 15
PAPER_BISECTIONS = 8
_FAR_WITHIN = 0.1
_HEAD = torch.ones(1, dtype=torch.bool)

Trial = tuple[HeadThresholds, HeadScores]


def single_fidelity(scorer: LayerScorer, settings: SearchSettings) -> Best:
    """Ax on one head at the longest length with all rows; the best of what it tried."""
    best = Best(1, settings.tolerance)
    for thresholds, scores in _optimise(scorer, settings, settings.longest, SINGLE_TRIALS):
        best.see(thresholds, scores.error, scores.sparsity)
    return best


class PaperSearch(ThetaLayerSearch):
    """The paper's three stages, for a layer of one head."""

    def _explore(self) -> Explored:
        return self._step("explore", Explored, self._bayes)

    def _bayes(self) -> Explored:
        shortest, tolerance = self._settings.lengths[0], self._settings.tolerance
        trials = _optimise(self._scorer, self._settings, shortest, PAPER_TRIALS)

        def merit(trial: Trial) -> tuple[bool, float]:
            error, sparsity = (float(each) for each in (trial[1].error, trial[1].sparsity))
            return (True, sparsity) if error <= tolerance else (False, -error)

        thresholds, scores = max(trials, key=merit)
        best = Candidate(
            thresholds.theta, thresholds.tau, torch.tensor([START_SLOPE]), scores.sparsity
        )
        return Explored(best, without_theta=best)

    def _refine(self, explored: Explored) -> Refined:
        theta = explored.best.theta
        evaluator = self._scorer.evaluator(CALIBRATION, self._settings.longest, None)
        low, high = MIN_DEPTH, MAX_DEPTH
        found, zero = torch.ones(1), torch.zeros(1, dtype=torch.float64)
        at_found = HeadScores(error=zero, sparsity=zero)
        for _ in range(PAPER_BISECTIONS):
            depth = (low + high) / 2
            tau = tau_of(torch.tensor([depth]))
            scores = self._scorer.score(evaluator, HeadThresholds(tau, theta), _HEAD)
            if float(scores.error) <= self._settings.tolerance:
                high, found, at_found = depth, tau, scores
            else:
                low = depth
        return Refined(theta, found, explored.best.slope, at_found.sparsity, error=at_found.error)


def _optimise(
    scorer: LayerScorer, settings: SearchSettings, length: int, num_trials: int
) -> list[Trial]:
    evaluator = scorer.evaluator(CALIBRATION, length, None)
    trials: list[Trial] = []

    def score(depth: float, theta: float) -> tuple[float, float]:
        thresholds = HeadThresholds(tau_of(torch.tensor([depth])), torch.tensor([theta]))
        scores = scorer.score(evaluator, thresholds, _HEAD)
        trials.append((thresholds, scores))
        return float(scores.sparsity), float(scores.error)

    # Imported here: it takes seconds, and most arms do without.
    from vllm_afbs.tuning.allocation.bayes import for_ax

    with for_ax(settings.seed):
        _run_ax(score, settings, num_trials)
    return trials


def _run_ax(
    score: Callable[[float, float], tuple[float, float]], settings: SearchSettings, num_trials: int
) -> None:
    from ax.api.client import Client
    from ax.api.configs import RangeParameterConfig

    logging.getLogger("ax.api.client").setLevel(logging.ERROR)  # it tells of every step
    client = Client(random_seed=settings.seed)
    bounds = {"depth": (LEAST_DEPTH, MOST_DEPTH), "theta": (-1.0, 1.0)}
    client.configure_experiment(
        [
            RangeParameterConfig(name=name, bounds=ends, parameter_type="float")
            for name, ends in bounds.items()
        ]
    )
    client.configure_optimization("sparsity", outcome_constraints=["excess <= 0.0"])
    for _ in range(num_trials):
        for index, parameters in client.get_next_trials(max_trials=1).items():
            sparsity, error = score(float(parameters["depth"]), float(parameters["theta"]))
            # A Gaussian process fits the log of the error better, but not where all is computed
            # and the log has no end: far within the tolerance is far enough.
            excess = math.log(max(error / settings.tolerance, _FAR_WITHIN))
            client.complete_trial(index, {"sparsity": (sparsity, 0.0), "excess": (excess, 0.0)})
