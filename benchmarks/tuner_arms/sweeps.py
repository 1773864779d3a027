"""Arms that sweep or draw thresholds at the longest length with all rows.

- *spargeattn*: SpargeAttn's own tuner: 32 values of theta, and for each a bisection on tau.
- *grid*: 16 values of tau by 8 of theta.
- *random*: 32 draws a head.
- *one setting*: one tau for all heads of the model, no theta, by bisection on the mean error.
- *oracle*: no tuner, but the most that tau and theta allow on the calibration text: 36 values of
  tau by 11 quantiles of theta, and at each quantile a bisection between the sparsest tau that was
  accepted and the one below it. It fits the calibration text that closely, and nothing protects it
  from other text.
"""

from collections.abc import Sequence

import torch

from benchmarks.tuner_arms.arms import Best, Found
from vllm_afbs.captures import CALIBRATION, Capture
from vllm_afbs.kernels import THETA_OFF, HeadThresholds
from vllm_afbs.tuning.search.depth import MAX_DEPTH, MIN_DEPTH, tau_of
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.scorer import LayerScorer, SearchSettings

SPARGE_THETAS = 32
SPARGE_BISECTIONS = 10
GRID_TAUS, GRID_THETAS = 16, 8
RANDOM_DRAWS = 32
GLOBAL_BISECTIONS = 10
ORACLE_TAUS, ORACLE_QUANTILES, ORACLE_BISECTIONS = 36, 11, 4
LEAST_DEPTH, MOST_DEPTH = 0.2, 7.0
"""Depths that arms which know nothing of the heads look between: tau 0.18 to 0.999."""
_MAX_QUANTILE = 0.5  # blocks below theta are always computed


class _Sweep:
    """One layer, scored for all heads at once."""

    def __init__(self, scorer: LayerScorer, settings: SearchSettings) -> None:
        self.evaluator: LayerEvaluator = scorer.evaluator(CALIBRATION, settings.longest, None)
        self.num_heads = self.evaluator.num_heads
        self.best = Best(self.num_heads, settings.tolerance)
        self._scorer = scorer
        self._everyone = torch.ones(self.num_heads, dtype=torch.bool)

    def within(self, tau: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Scores all heads; returns which are within the tolerance."""
        thresholds = HeadThresholds(tau, theta)
        scores = self._scorer.score(self.evaluator, thresholds, self._everyone)
        return self.best.see(thresholds, scores.error, scores.sparsity)

    def uniform(self, value: float) -> torch.Tensor:
        """The same for all heads."""
        return torch.full((self.num_heads,), value)


def spargeattn(scorer: LayerScorer, settings: SearchSettings) -> Best:
    """Every theta of a grid, and a bisection on tau for each."""
    sweep = _Sweep(scorer, settings)
    for theta in torch.linspace(-1.0, 1.0, SPARGE_THETAS).tolist():
        low, high = sweep.uniform(0.0), sweep.uniform(1.0)
        for _ in range(SPARGE_BISECTIONS):
            tau = (low + high) / 2
            within = sweep.within(tau, sweep.uniform(theta))
            high = torch.where(within, tau, high)
            low = torch.where(within, low, tau)
    return sweep.best


def grid(scorer: LayerScorer, settings: SearchSettings) -> Best:
    """Every pair of a plain grid."""
    sweep = _Sweep(scorer, settings)
    for theta in torch.linspace(-1.0, 1.0, GRID_THETAS).tolist():
        # Even in log(1 - tau), where error is even: as kind to the grid as to our own search.
        for depth in torch.linspace(LEAST_DEPTH, MOST_DEPTH, GRID_TAUS).tolist():
            sweep.within(tau_of(sweep.uniform(depth)), sweep.uniform(theta))
    return sweep.best


def random_search(scorer: LayerScorer, settings: SearchSettings) -> Best:
    """Uniform draws of (log(1 - tau), theta)."""
    sweep = _Sweep(scorer, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(RANDOM_DRAWS):
        draws = torch.rand(2, sweep.num_heads, generator=generator)
        depth = LEAST_DEPTH + (MOST_DEPTH - LEAST_DEPTH) * draws[0]
        sweep.within(tau_of(depth), 2.0 * draws[1] - 1.0)
    return sweep.best


def oracle(scorer: LayerScorer, settings: SearchSettings) -> Best:
    """A dense grid, its steps halved where they matter."""
    sweep = _Sweep(scorer, settings)
    depths = torch.linspace(MIN_DEPTH, MAX_DEPTH, ORACLE_TAUS)
    spacing = float(depths[1] - depths[0])
    for quantile in torch.linspace(0.0, _MAX_QUANTILE, ORACLE_QUANTILES).tolist():
        theta = sweep.evaluator.theta_at(quantile)
        high = sweep.uniform(torch.inf)
        for depth in depths.tolist():
            within = sweep.within(tau_of(sweep.uniform(depth)), theta)
            high = torch.where(within, high.clamp_max(depth), high)
        high = high.clamp_max(MAX_DEPTH)
        for halving in range(1, ORACLE_BISECTIONS + 1):
            tried = (high - spacing / 2**halving).clamp_min(MIN_DEPTH)
            high = torch.where(sweep.within(tau_of(tried), theta), tried, high)
    return sweep.best


def one_setting(settings: SearchSettings, layers: Sequence[int], capture: Capture) -> list[Found]:
    """Bisects one tau for all heads of all layers."""
    scorers = [LayerScorer(settings, layer, capture) for layer in layers]
    low, high = 0.0, 1.0
    for _ in range(GLOBAL_BISECTIONS):
        tau, errors = (low + high) / 2, []
        for scorer in scorers:
            evaluator = scorer.evaluator(CALIBRATION, settings.longest, None)
            everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
            errors.append(scorer.score(evaluator, _uniform(evaluator, tau), everyone).error)
        within = float(torch.cat(errors).mean()) <= settings.tolerance
        low, high = (low, tau) if within else (tau, high)
    chosen = _uniform(evaluator, high)
    return [Found(chosen.tau, chosen.theta, each.evaluations, each.cost) for each in scorers]


def _uniform(evaluator: LayerEvaluator, tau: float) -> HeadThresholds:
    num_heads = evaluator.num_heads
    return HeadThresholds(torch.full((num_heads,), tau), torch.full((num_heads,), THETA_OFF))
