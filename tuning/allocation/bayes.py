"""Ax: multi-objective Bayesian optimisation of tolerances by groups of layers.

A trial is a point ``(x, overall)``: the analytic division of the budget ``2^overall``, and on top
each group's tolerances times ``2^x``. Its values are the log of the predicted time and the log of
the model's divergence. Time is computed and therefore exact. Divergence is measured on few windows,
and how noisy that is depends on the fidelity: readings are taken over the analytic division's at
the same fidelity, and each has its own standard error.

Only this module imports Ax. It uses core objects, which Ax does not promise to keep: pyproject.toml
caps its version (1.3.1 was read).
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ax.adapter.registry import Generators
from ax.core.arm import Arm
from ax.core.data import Data, DataRow
from ax.core.experiment import Experiment
from ax.core.metric import Metric
from ax.core.objective import MultiObjective, Objective
from ax.core.optimization_config import MultiObjectiveOptimizationConfig, OptimizationConfig
from ax.core.outcome_constraint import ObjectiveThreshold
from ax.core.parameter import ParameterType, RangeParameter
from ax.core.search_space import SearchSpace

_TIME, _KL = "log_time", "log_kl"
_EXACT = 1e-4
"""Standard error of a log time, which is computed: small, but a Gaussian process can be fitted."""
# Seven dimensions and twenty points need no finer optimisation; a proposal takes about a second.
_OPTIONS: dict[str, Any] = {
    "optimizer_kwargs": {"num_restarts": 2, "raw_samples": 32, "options": {"maxiter": 40}}
}


@contextmanager
def for_ax(seed: int) -> Iterator[None]:
    """What Ax needs around it.

    Fitting needs gradients, which the caller may have switched off. Ax draws from the global random
    state, which belongs to the caller. Nobody reads Ax's warnings.

    Args:
        seed: Of the random state that Ax gets.
    """
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Trial:
    """A finished trial, as Ax sees it.

    Attributes:
        parameters: Each group's ``x``, then ``overall``.
        log_time: Log of the predicted time over that of dense attention.
        log_kl: Log of the divergence over the analytic division's at the same fidelity.
        noise: Standard error of ``log_kl``.
    """

    parameters: tuple[float, ...]
    log_time: float
    log_kl: float
    noise: float


@dataclass(frozen=True)
class Space:
    """Where trials lie.

    Attributes:
        num_groups: Groups of layers.
        reach: Bound of ``x`` on either side.
        overall: Bounds of ``overall``.
    """

    num_groups: int
    reach: float
    overall: tuple[float, float]

    def parameters(self) -> list[RangeParameter]:
        """The parameters in Ax's terms."""
        bounds = {f"x{group}": (-self.reach, self.reach) for group in range(self.num_groups)}
        bounds["overall"] = self.overall
        return [
            RangeParameter(name, ParameterType.FLOAT, lower=low, upper=high)
            for name, (low, high) in bounds.items()
        ]


class Optimizer:
    """Proposes trials; a function of its arguments alone.

    Args:
        space: Where trials lie.
        trials: Those that are finished.
        worst: Log time and log divergence that no level should exceed.
        seed: Of this proposal.
        weight: None for both objectives; else log time is added to log divergence with this
            weight, and their sum is the only objective.
    """

    def __init__(
        self,
        space: Space,
        trials: Sequence[Trial],
        worst: tuple[float, float],
        seed: int,
        weight: float | None = None,
    ) -> None:
        logging.getLogger("ax").setLevel(logging.ERROR)
        self._seed = seed
        self._weight = weight
        self._experiment = Experiment(
            search_space=SearchSpace(space.parameters()),
            optimization_config=_both(worst) if weight is None else _one(),
        )
        for trial in trials:
            self._attach(trial)

    def design(self, count: int) -> list[tuple[float, ...]]:
        """The points that precede the model, a Sobol sequence."""
        with for_ax(self._seed):
            sobol = Generators.SOBOL(experiment=self._experiment, seed=self._seed)
            return [_point(arm) for arm in sobol.gen(count).arms]

    def propose(self) -> tuple[float, ...]:
        """The point to try next, by the model."""
        with for_ax(self._seed):
            data = self._experiment.lookup_data()
            model = Generators.BOTORCH_MODULAR(experiment=self._experiment, data=data)
            return _point(model.gen(1, model_gen_options=_OPTIONS).arms[0])

    def _attach(self, done: Trial) -> None:
        trial = self._experiment.new_trial()
        name = f"{trial.index}_0"
        *groups, overall = done.parameters
        values = {f"x{group}": value for group, value in enumerate(groups)}
        trial.add_arm(Arm(values | {"overall": overall}, name=name))
        trial.mark_running(no_runner_required=True)
        means = {_TIME: (done.log_time, _EXACT), _KL: (done.log_kl, done.noise)}
        if self._weight is not None:
            means = {_KL: (done.log_kl + self._weight * done.log_time, done.noise)}
        rows = [
            DataRow(trial.index, name, metric, metric, mean=mean, se=error)
            for metric, (mean, error) in means.items()
        ]
        self._experiment.attach_data(Data(data_rows=rows))
        trial.mark_completed()


def _both(worst: tuple[float, float]) -> MultiObjectiveOptimizationConfig:
    metrics = [Metric(name, lower_is_better=True) for name in (_TIME, _KL)]
    return MultiObjectiveOptimizationConfig(
        MultiObjective([Objective(metric=metric, minimize=True) for metric in metrics]),
        objective_thresholds=[
            ObjectiveThreshold(metric, bound, relative=False)
            for metric, bound in zip(metrics, worst, strict=True)
        ],
    )


def _one() -> OptimizationConfig:
    return OptimizationConfig(Objective(metric=Metric(_KL, lower_is_better=True), minimize=True))


def _point(arm: Arm) -> tuple[float, ...]:
    values = dict(arm.parameters)
    overall = float(values.pop("overall"))  # type: ignore[arg-type]
    groups = [float(values[f"x{group}"]) for group in range(len(values))]  # type: ignore[arg-type]
    return (*groups, overall)
