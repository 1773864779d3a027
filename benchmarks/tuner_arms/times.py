"""Wall time of each arm, alone on the machine.

The evaluator keeps a layer's exact attention where that fits into memory, so the second score at a
length costs far less than the first. That flatters the arms that score most, so each is timed
without it as well: what it would take on tensors that do not fit.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmarks.domains import Domain
from benchmarks.tuner_arms.samples import (
    ON_SOME_LAYERS,
    Plan,
    Scope,
    captured,
    choose,
)
from vllm_afbs.captures import Capture
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.device import compute_device
from vllm_afbs.tuning.journal import Journal
from vllm_afbs.tuning.search.evaluator import LayerEvaluator
from vllm_afbs.tuning.search.scorer import SearchSettings

Times = dict[str, list[float]]
"""In each of ``WAYS``, the seconds a head of every layer."""
WITH_CACHE, WITHOUT_CACHE = "seconds a head", "seconds a head without the cache"


def without_cache() -> AbstractContextManager[object]:
    """While it lasts, evaluators keep nothing; the product has no switch for it and needs none."""
    return mock.patch.object(LayerEvaluator, "_partials", LayerEvaluator._compute_partials)


WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    WITH_CACHE: nullcontext,
    WITHOUT_CACHE: without_cache,
}


def time_arms(
    plan: Plan, domain: Domain, names: Sequence[str], num_layers: int, work: Path
) -> dict[str, Times]:
    """Times arms on some layers of one text under the first seed, or reads what was kept.

    The oracle is left out, as it is no tuner.

    Args:
        plan: Everybody's settings.
        domain: The text.
        names: The arms.
        num_layers: How many layers, spread over the model.
        work: Folder of the journals.

    Returns:
        For each arm and each of ``WAYS`` the seconds a head, one for each layer.
    """
    tuners = [name for name in names if name not in ON_SOME_LAYERS]
    device = str(compute_device())
    header = {**asdict(plan), "text": domain.name, "layers": num_layers, "device": device}
    journal = Journal(work / "times.jsonl", header)
    if all(name in journal for name in tuners):
        return {name: journal.result(name, Times) for name in tuners}
    scope = Scope.of(open_model(plan.model), plan.every, num_layers)
    settings = plan.settings(0)
    with (
        captured(plan, domain.calibration, seed=0) as taken,
        torch.inference_mode(),
    ):
        _warm_up(tuners, settings, scope, taken)
        return {
            name: journal.step(name, Times, partial(_time, name, settings, scope, taken))
            for name in tuners
        }


def _time(name: str, settings: SearchSettings, scope: Scope, taken: Capture) -> Times:
    seconds: Times = {way: [] for way in WAYS}
    for layer, head in scope.slow:
        alone = Scope([layer], scope.num_heads, [(layer, head)])
        for way, context in WAYS.items():
            with context():
                start = time.perf_counter()
                choices = choose(name, settings, alone, taken)
                seconds[way].append((time.perf_counter() - start) / len(choices))
    print(f"timed {name}", flush=True)
    return seconds


def _warm_up(tuners: Sequence[str], settings: SearchSettings, scope: Scope, taken: Capture) -> None:
    """Has everything imported and the device started before the first arm's clock is."""
    layer = scope.layers[0]
    for name in {"one setting", "theta trials", "single-fidelity BO"} & set(tuners):
        choose(name, settings, Scope([layer], scope.num_heads, [(layer, 0)]), taken)
