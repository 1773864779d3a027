"""The search for the division that reaches a goal, and its acceptance.

The budget of the analytic division moves by as much as the goal was missed, until the model reaches
it on held-out text. A promise about perplexity then has to be accepted on windows that none of this
has seen; if it is not, divisions with less damage follow.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_afbs.errors import InputError
from vllm_afbs.profile.tuner_run import Acceptance
from vllm_afbs.tuning.allocation.acceptance import (
    BACK_OFF,
    CANDIDATES,
    AcceptanceTest,
    Increase,
)
from vllm_afbs.tuning.allocation.analytic import Analytic, Division
from vllm_afbs.tuning.allocation.goal import Goal, Measured
from vllm_afbs.tuning.allocation.model_runs import Layers, ModelRuns, Runs, served_thresholds
from vllm_afbs.tuning.progress import Progress

ATTEMPTS = 4
"""Most divisions that the search measures. Chosen on SmolLM2-135M."""


@dataclass(frozen=True)
class Candidate:
    """A division of the error among layers that was settled and measured.

    Attributes:
        budget: What was divided; see ``Goal.first_budget``.
        division: Each layer's tolerance.
        layers: The layers as the profile would have them.
        runs: The whole model's runs with them, on held-out text.
        measured: What they do there.
    """

    budget: float
    division: Division
    layers: Layers
    runs: Runs
    measured: Measured


@dataclass
class GoalSearch:
    """A search in progress.

    Args:
        goal: What is wanted.
        analytic: Divides a budget; its damages are in nats.
        measure: Settles and measures a division of a budget.
        progress: Is told how far the search is.
        runs: Has the model.
    """

    goal: Goal
    analytic: Analytic
    measure: Callable[[float, Division], Candidate]
    progress: Progress
    runs: ModelRuns
    _tried: list[Division] = field(default_factory=list, init=False)

    def run(self, acceptance: AcceptanceTest | None) -> tuple[Candidate, Acceptance | None]:
        """Finds the division, and has its perplexity accepted if that was promised.

        Raises:
            InputError: No attempt reached the goal, or none was accepted.
        """
        chosen = self._steered()
        return (chosen, None) if acceptance is None else self._accepted(acceptance, chosen)

    def _steered(self) -> Candidate:
        """The best attempt that reaches the goal on held-out text."""
        budget, reached = self.goal.first_budget(), []
        best: Candidate | None = None
        while len(self._tried) < ATTEMPTS:
            candidate = self._attempt(budget)
            if candidate is None:
                break
            reached.append(self.goal.reached(candidate.measured))
            if self.goal.allows(reached[-1]) and (
                best is None or self.goal.prefers(candidate.measured, best.measured)
            ):
                best = candidate
            if self.goal.is_met_closely(reached[-1]):
                break
            budget = self.goal.next_budget(budget, reached[-1])
        if best is None:
            raise InputError(self.goal.missed(reached))
        return best

    def _accepted(
        self, acceptance: AcceptanceTest, candidate: Candidate | None
    ) -> tuple[Candidate, Acceptance]:
        """The first candidate whose bound is within the goal, with less damage each time."""
        goal = self.goal
        refused: list[Increase] = []
        while candidate is not None and len(refused) < CANDIDATES:
            increase = acceptance.increase(
                f"{goal.kind} {goal.value!r} candidate {len(refused) + 1}",
                self.runs.model,
                served_thresholds(candidate.layers),
            )
            if increase.bound <= goal.value:
                return candidate, acceptance.record(increase, len(refused) + 1)
            refused.append(increase)
            if len(refused) < CANDIDATES:
                candidate = self._attempt(candidate.budget * BACK_OFF)
        raise InputError(goal.refused(refused))

    def _attempt(self, budget: float) -> Candidate | None:
        """Measures the division of a budget; None if it was tried before."""
        division = self.goal.division(self.analytic, budget)
        if division in self._tried:
            return None
        self._tried.append(division)
        self.progress.begin(f"Attempt {len(self._tried)}", len(division))
        return self.measure(budget, division)
