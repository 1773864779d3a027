"""Which levels hold for a LoRA adapter, which the search for levels knows nothing of."""

from collections.abc import Sequence

from vllm_afbs.profile.adapters import AdapterLevel, AdapterProfile
from vllm_afbs.tuning.allocation.levels import TunedLevel
from vllm_afbs.tuning.allocation.model_runs import ModelRuns
from vllm_afbs.tuning.engine import Adapter

LARGEST_KL_RATIO = 1.25
"""Largest divergence with an adapter, over the base model's on the same windows, at which a level
holds for it. A level's divergence has to mean the same with the adapter as without. What is allowed
above 1 is for the noise of the few windows that levels are measured on."""


def validated(adapter: Adapter, runs: ModelRuns, levels: Sequence[TunedLevel]) -> AdapterProfile:
    """Runs a model with an adapter at every level, on the windows that the levels were measured on.

    Args:
        adapter: The adapter.
        runs: Runs the model with it.
        levels: The levels, each of which the base model was run with.
    """
    return AdapterProfile(
        name=adapter.name,
        sha256=adapter.sha256,
        levels=[_validated(runs, level) for level in levels],
    )


def _validated(runs: ModelRuns, level: TunedLevel) -> AdapterLevel:
    base = level.runs
    assert base is not None
    kl = runs.whole_model(level.layers, base.windows, base.length).whole.kl
    return AdapterLevel(kl=kl, holds=kl <= LARGEST_KL_RATIO * base.whole.kl)
