"""What the CPU and the CUDA backend do alike around vLLM's own classes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from vllm_afbs.backends import adapters
from vllm_afbs.observability import fallbacks, metrics, served_level
from vllm_afbs.observability.kill_switch import KillSwitch
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import configuration
from vllm_afbs.serving.batch import DenseRequests, Step, sort_requests
from vllm_afbs.serving.plan import LayerPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

_Metadata = TypeVar("_Metadata")


class Builder(Protocol):
    """What our metadata builders can do beside building metadata."""

    def serve(self, profile: Profile | None, always_sparse: bool = False) -> None:
        """Gives each layer what it serves, from the next step on.

        Args:
            profile: The profile; None runs every layer dense.
            always_sparse: Whether layers also run sparse where dense is expected to be faster.
        """

    def finish_reports(self) -> None:
        """Waits until the metrics hold the work of all steps so far."""


_BUILDERS: "WeakSet[Builder]" = WeakSet()


def add_builder(builder: Builder) -> None:
    """Remembers a builder for ``served_builders``."""
    _BUILDERS.add(builder)


def served_builders() -> list[Builder]:
    """The builders of this process's model."""
    return list(_BUILDERS)


class StepSorter:
    """Sorts the requests of each step by what the profile, LoRA and the kill switch allow.

    It also decides which of the profile's levels the step serves.
    """

    def __init__(self, vllm_config: "VllmConfig", profile: Profile | None = None) -> None:
        """Looks at the kill switch once, so that its metric exists before the first prefill.

        Args:
            vllm_config: The worker's configuration.
            profile: The profile that is served, if any.
        """
        self._vllm_config = vllm_config
        self._kill_switch = KillSwitch()
        self._tells_adapters_apart = configuration.tells_adapters_apart(vllm_config)
        self._num_decode_rows = configuration.num_decode_rows(vllm_config)
        self.serve(profile)

    def serve(self, profile: Profile | None) -> None:
        """Serves another profile from the next step on; None runs everything dense."""
        self._profile = profile
        self._dial = None
        self._adapters: list[frozenset[str]] = [frozenset()]
        if profile is not None:
            may_run = configuration.serves_adapters(self._vllm_config)
            self._adapters = [
                profile.validated_adapters(level) if may_run else frozenset()
                for level in range(len(profile.levels))
            ]
            levels = served_level.Levels.of(self._vllm_config, profile)
            self._dial = served_level.dial(levels)

    def sort(
        self, common: "CommonAttentionMetadata", seq_lens: torch.Tensor | None, plain_causal: bool
    ) -> Step:
        """Sorts one step's requests.

        Args:
            common: The step, as vLLM describes it to every backend.
            seq_lens: Context lengths, ``[num_reqs]``, int32, on the CPU; None if unknown.
            plain_causal: Whether the step's mask is plainly causal.
        """
        # The kill switch and the level are files; steps that only decode do not look for them.
        has_prefill = common.max_query_len > 1
        starts = common.query_start_loc_cpu  # the same object in all metadata of a step
        level = 0
        if has_prefill and self._dial is not None:
            level = self._dial.index(starts, self)
        return sort_requests(
            starts,
            seq_lens,
            self._profile,
            plain_causal=plain_causal,
            enabled=not has_prefill or self._kill_switch.is_enabled(),
            level=level,
            may_have_adapter=self._tells_adapters_apart
            and adapters.may_be_active(self._adapters[level]),
            num_decode_rows=self._num_decode_rows,
        )


def count_dense(step: Step, plans: Sequence[LayerPlan]) -> None:
    """Counts a step's prefills that run dense, once for each layer.

    It leaves out those that the dispatcher leaves dense, which layers count themselves.

    Args:
        step: The step.
        plans: The layers' plans at the step's level.
    """
    num_long = len(step.long_prefills)
    counts = Counter({why: count * len(plans) for why, count in step.dense_reasons.items()})
    if num_long:
        for plan in plans:
            if plan.dense_reason is not None:
                counts[plan.dense_reason] += num_long
    fallbacks.count(counts)
    metrics.count_tokens("dense", step.num_dense_tokens * len(plans))


def extend_metadata(kind: type[_Metadata], metadata: Any, **added: Any) -> _Metadata:
    """Copies a step's metadata into a subclass that has more fields.

    Args:
        kind: The subclass, a dataclass.
        metadata: The metadata as vLLM's own builder made it.
        added: The values of the subclass's own fields.
    """
    values = {item.name: getattr(metadata, item.name) for item in fields(metadata)}
    return kind(**values, **added)


def attend_dense_requests(
    forward: Callable[..., object],
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    requests: DenseRequests,
    output: torch.Tensor,
) -> None:
    """Runs vLLM's dense attention on some of a step's requests.

    Args:
        forward: The ``forward`` of vLLM's own implementation of this layer.
        layer: As vLLM passes it to ``forward``.
        query: The whole step's queries, ``[num_tokens, num_heads, head_dim]``.
        key: As vLLM passes it to ``forward``.
        value: As vLLM passes it to ``forward``.
        kv_cache: As vLLM passes it to ``forward``.
        requests: The requests to attend to.
        output: Like ``query``; the requests' rows are written.
    """
    rows = output.new_empty(len(requests.rows), *output.shape[1:])
    forward(layer, query[requests.rows], key, value, kv_cache, requests.metadata, rows)
    output[requests.rows] = rows
