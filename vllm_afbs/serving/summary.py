"""What a server logs about its layers: how many run sparse, at which lengths, why others do not."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm_afbs import compat
from vllm_afbs.profile.adapters import describe_adapters
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, configuration
from vllm_afbs.serving.plan import LayerPlan
from vllm_afbs.serving.reasons import KINDS, Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.afbs")

_PLANS: "WeakKeyDictionary[Any, LayerPlan]" = WeakKeyDictionary()
"""What this process's layers serve, by vLLM's layer.

A model has one metadata builder for each group of layers, and vLLM may make builders again: after
it has profiled the memory, or one for each microbatch.
"""


@dataclass(frozen=True)
class Summary:
    """What the layers of a model serve.

    Attributes:
        num_sparse: Number of layers that may run sparse.
        dense: Number of dense layers with full attention, by reason.
        num_others: Number of layers without full attention, which are vLLM's own.
        shortest: Shortest calibrated context, in tokens.
        longest: Longest context that the profile covers and the server accepts, in tokens.
        limit: Why no prompt of this server reaches the layers that were tuned to run sparse, with
            its reason; None if prompts do.
        level: The level served at start; None if the profile has only one.
    """

    num_sparse: int
    dense: Counter[Reason]
    num_others: int = 0
    shortest: int = 0
    longest: int = 0
    limit: "Limit | None" = None
    level: str | None = None

    @classmethod
    def of(
        cls, vllm_config: "VllmConfig", profile: Profile | None, plans: Iterable[LayerPlan]
    ) -> "Summary":
        """Sums up plans, within the lengths that the server accepts.

        Args:
            vllm_config: The server's configuration.
            profile: The admitted profile, if any.
            plans: The plans of all layers.
        """
        dense: Counter[Reason] = Counter()
        num_sparse = 0
        full = [plan for plan in plans if not plan.is_local]
        for plan in full:
            if plan.dense_reason is None:
                num_sparse += 1
            else:
                dense[plan.dense_reason] += 1
        # A drafter's layers are none of the model's.
        num_full = len(full) - dense["unknown_layer"]
        num_others = max(0, configuration.num_decoder_layers(vllm_config) - num_full)
        if profile is None:
            return cls(0, dense, num_others)
        longest = min(profile.max_seq_len, int(vllm_config.model_config.max_model_len))
        limit = _limit(vllm_config, profile) if num_sparse else None
        if limit is not None:
            dense[limit.reason] += num_sparse
            num_sparse = 0
        level = None
        if len(profile.levels) > 1:
            level = profile.levels[admission.start_level(vllm_config, profile)].name
        return cls(num_sparse, dense, num_others, profile.min_seq_len, longest, limit, level)

    def __str__(self) -> str:
        num_dense = self.dense.total()
        line = f"{self.num_sparse} of {self.num_sparse + num_dense} layers sparse"
        if self.num_sparse:
            line += f" at level {self.level}" if self.level is not None else ""
            line += f" from {self.shortest:,} to {self.longest:,} tokens"
        if num_dense:
            counts = self.dense.most_common()
            single = len(counts) == 1
            reasons = [reason if single else f"{count} {reason}" for reason, count in counts]
            line += f"; {num_dense} dense: {', '.join(reasons)}"
        if self.limit is not None:
            line += f" ({self.limit.explanation})"
        if self.num_others:
            others = "1 other has" if self.num_others == 1 else f"{self.num_others} others have"
            line += f"; {others} no full attention"
        return line


@dataclass(frozen=True)
class Limit:
    """A setting of the server that keeps every prompt from running sparse.

    Attributes:
        reason: The reason with which prefills will run dense.
        explanation: The setting and what it falls short of.
    """

    reason: Reason
    explanation: str


def _limit(vllm_config: "VllmConfig", profile: Profile) -> Limit | None:
    longest, shortest = int(vllm_config.model_config.max_model_len), profile.min_seq_len
    if longest < shortest:
        return Limit(
            "short_context",
            f"max_model_len is {longest:,}, the shortest calibrated context {shortest:,}",
        )
    chunk = configuration.longest_chunk(vllm_config)
    if chunk < profile.block_q:
        return Limit(
            "short_query",
            f"chunks have at most {chunk:,} tokens, the profile's query blocks {profile.block_q:,}",
        )
    return None


def plans(vllm_config: "VllmConfig") -> dict[str, LayerPlan]:
    """The plans that were reported for this model's layers, by the layer's name."""
    layers = compat.attention_layers(vllm_config, None)
    return {name: _PLANS[layer] for name, layer in layers.items() if layer in _PLANS}


def report(
    vllm_config: "VllmConfig",
    profile: Profile | None,
    layer_names: list[str],
    final: Sequence[LayerPlan],
) -> None:
    """Takes what layers will serve; logs once which of them run dense, and the summary.

    It logs the summary once every layer of the model has a plan, which is one line for each server:
    with tensor or data parallelism, only the first rank of a machine logs it. With pipeline
    parallelism, each stage logs a line about its own layers.

    Args:
        vllm_config: The worker's configuration.
        profile: The admitted profile, if any.
        layer_names: The layers of one metadata builder.
        final: Their plans, in the order of ``plan_layers``.
    """
    layers = compat.attention_layers(vllm_config, None)
    changed: dict[str, LayerPlan] = {}
    own = compat.attention_layers(vllm_config, layer_names).items()
    for (name, layer), plan in zip(own, final, strict=True):
        earlier = _PLANS.get(layer)
        if earlier is None or earlier.dense_reason != plan.dense_reason:
            changed[name] = plan
        _PLANS[layer] = plan
    _log_dense_layers(changed)
    missing = [name for name, layer in layers.items() if layer not in _PLANS]
    # A layer that needs no cache, such as an encoder's, may have no builder. vLLM's configuration
    # is asked for caches only while some layer has no plan.
    waiting = missing and any(
        name in missing and compat.is_ours(layers[name]) for name in compat.cache_specs(vllm_config)
    )
    if not changed or waiting or not compat.is_first_rank(vllm_config):
        return
    stage, num_stages = compat.pipeline_stage()
    place = f"Pipeline stage {stage + 1} of {num_stages}: " if num_stages > 1 else ""
    summary = Summary.of(vllm_config, profile, plans(vllm_config).values())
    level = logging.INFO if summary.num_sparse else logging.WARNING
    logger.log(level, "%s%s.", place, summary)
    if profile is not None and configuration.serves_adapters(vllm_config):
        logger.info("%s.", adapters(profile))


def adapters(profile: Profile) -> str:
    """Says which LoRA adapters may run sparse, on a server that tells them apart."""
    names = [level.name for level in profile.levels]
    return f"LoRA adapters that may run sparse: {describe_adapters(profile.adapters, names)}"


def _log_dense_layers(plans: Mapping[str, LayerPlan]) -> None:
    """Logs one line for each reason, with the number of its layers and their names."""
    layers: dict[Reason, list[str]] = {}
    for name, plan in plans.items():
        reason = plan.dense_reason
        # Admission has logged the one, and the summary logs the other.
        if reason not in (None, "no_profile", "local_attention"):
            layers.setdefault(reason, []).append(name)
    for reason, names in layers.items():
        level = logging.WARNING if KINDS[reason] == "fixed" else logging.INFO
        logger.log(
            level, "%d layers run dense: %s (%s to %s).", len(names), reason, names[0], names[-1]
        )
