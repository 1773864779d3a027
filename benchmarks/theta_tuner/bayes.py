"""Stage 1's proposals: multi-fidelity Bayesian optimisation of one layer, by Ax.

Ax sits above the heads: a trial is a whole layer at one quantile (which sets each head's theta, see
``LayerEvaluator.theta_at``) and one length. Its value is the heads' mean sparsity once each head's
tau has been searched, where a head leaves theta off if it skips more that way. So Ax's own time
grows with the number of layers and not with the number of heads.

Ax sees the quantile's square root: the quantiles that pay are mostly small (0.02 to 0.2 on
SmolLM2-135M), and on a plain scale the first proposals passed them over.

The fidelity is the length. Ax's public API (1.3.1) cannot express one, so this module uses core
objects, which Ax does not promise to keep: pyproject.toml caps its version.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ax.adapter.registry import Generators
from ax.core.arm import Arm
from ax.core.data import Data, DataRow
from ax.core.experiment import Experiment
from ax.core.metric import Metric
from ax.core.objective import Objective
from ax.core.observation import ObservationFeatures
from ax.core.optimization_config import OptimizationConfig
from ax.core.parameter import ParameterType, RangeParameter
from ax.core.search_space import SearchSpace
from ax.generators.torch.botorch_modular.surrogate import SurrogateSpec
from ax.generators.torch.botorch_modular.utils import ModelConfig
from botorch.acquisition.max_value_entropy_search import qMultiFidelityMaxValueEntropy
from botorch.models.gp_regression_fidelity import SingleTaskMultiFidelityGP
from botorch.models.transforms.input import Normalize

from vllm_afbs.tuning.allocation.bayes import for_ax

MAX_QUANTILE = 0.4
"""Largest quantile that is tried. Blocks below theta are always computed: where they are 0.4 of the
query and key blocks, no head can skip much more than a third, on any model."""
_QUANTILE_STEP = 0.01
_SOBOL_POINTS = 16  # more than a layer has trials: one that rounds to a tried point is passed over
_METRIC = "sparsity"
_NOISE = 0.01
"""Standard error of a trial, which reads tau off a line near the tolerance: on SmolLM2-135M that
moved a layer's sparsity by about as much."""
_SURROGATE = SurrogateSpec(
    model_configs=[
        ModelConfig(
            botorch_model_class=SingleTaskMultiFidelityGP, input_transform_classes=[Normalize]
        )
    ],
    # Ax's batched default has no fidelity and fails.
    allow_batched_models=False,
)
# Max-value entropy takes 0.45 s a proposal with these, knowledge gradient 2 s, and both far more
# with their defaults; two dimensions need no finer optimisation. The intercept of the cost is
# Ax's own time, in units of a trial at the longest length.
_ACQUISITION: dict[str, Any] = {
    "acquisition_function_kwargs": {
        "fidelity_weights": {1: 1.0},
        "cost_intercept": 0.3,
        "candidate_size": 128,
        "num_fantasies": 4,
    },
    "optimizer_kwargs": {"num_restarts": 2, "raw_samples": 16, "options": {"maxiter": 20}},
}


@dataclass(frozen=True)
class Observation:
    """A finished trial, as Ax sees it.

    Attributes:
        quantile: Share of the blocks with a self-similarity below theta.
        length: Tokens of context.
        sparsity: Mean over heads at the tolerance, each with theta or without it.
    """

    quantile: float
    length: int
    sparsity: float


class LayerOptimizer:
    """Proposes quantiles and lengths for one layer; a function of its arguments alone.

    Args:
        lengths: The fidelities, shortest first; at least two.
        observations: The layer's trials so far.
        seed: Of this proposal.
    """

    def __init__(
        self, lengths: Sequence[int], observations: Sequence[Observation], seed: int
    ) -> None:
        self._lengths = lengths
        self._tried = {(seen.quantile, seen.length) for seen in observations}
        self._seed = seed
        self._experiment = _experiment(lengths)
        for observation in observations:
            self._attach(observation)

    def initial(self) -> tuple[float, int]:
        """The next point of the design that precedes the model, a Sobol sequence."""
        sobol = Generators.SOBOL(experiment=self._experiment, seed=self._seed)
        points = (self._snap(arm.parameters) for arm in sobol.gen(_SOBOL_POINTS).arms)
        return next(point for point in points if point not in self._tried)

    def propose(self) -> tuple[float, int] | None:
        """Quantile and length to try next; None if the best point was already tried."""
        with self._fitted() as adapter:
            run = adapter.gen(1, model_gen_options=_ACQUISITION)
        point = self._snap(run.arms[0].parameters)
        return None if point in self._tried else point

    def best_quantile(self) -> float:
        """The quantile with the highest expected sparsity at the longest length."""
        grid = [step * _QUANTILE_STEP for step in range(round(MAX_QUANTILE / _QUANTILE_STEP) + 1)]
        roots = map(math.sqrt, grid)
        points = [ObservationFeatures({"root": root, "fidelity": 1.0}) for root in roots]
        with self._fitted() as adapter:
            means = adapter.predict(points)[0][_METRIC]
        return round(grid[max(range(len(grid)), key=means.__getitem__)], 2)

    @contextmanager
    def _fitted(self) -> Iterator[Any]:
        with for_ax(self._seed):
            yield Generators.BOTORCH_MODULAR(
                experiment=self._experiment,
                data=self._experiment.lookup_data(),
                botorch_acqf_class=qMultiFidelityMaxValueEntropy,
                surrogate_spec=_SURROGATE,
            )

    def _attach(self, observation: Observation) -> None:
        trial = self._experiment.new_trial()
        fidelity = observation.length / self._lengths[-1]
        name = f"{trial.index}_0"
        root = math.sqrt(observation.quantile)
        trial.add_arm(Arm({"root": root, "fidelity": fidelity}, name=name))
        trial.mark_running(no_runner_required=True)
        row = DataRow(trial.index, name, _METRIC, _METRIC, mean=observation.sparsity, se=_NOISE)
        self._experiment.attach_data(Data(data_rows=[row]))
        trial.mark_completed()

    def _snap(self, parameters: Any) -> tuple[float, int]:
        quantile = round(round(parameters["root"] ** 2 / _QUANTILE_STEP) * _QUANTILE_STEP, 2)
        wanted = parameters["fidelity"] * self._lengths[-1]
        return quantile, min(self._lengths, key=lambda length: abs(length - wanted))


def _experiment(lengths: Sequence[int]) -> Experiment:
    logging.getLogger("ax").setLevel(logging.ERROR)
    root = RangeParameter("root", ParameterType.FLOAT, lower=0.0, upper=math.sqrt(MAX_QUANTILE))
    fidelity = RangeParameter(
        "fidelity",
        ParameterType.FLOAT,
        lower=lengths[0] / lengths[-1],
        upper=1.0,
        is_fidelity=True,
        target_value=1.0,
    )
    objective = Objective(metric=Metric(_METRIC, lower_is_better=False), minimize=False)
    return Experiment(
        search_space=SearchSpace([root, fidelity]),
        optimization_config=OptimizationConfig(objective),
    )
