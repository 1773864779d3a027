"""Decides what each attention layer serves at each level: which thresholds, or why it is dense."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_afbs import compat
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.schema import Profile, mean_calibration
from vllm_afbs.serving import eligibility
from vllm_afbs.serving.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig

UNKNOWN_LAYER = -1
"""Index of a layer that the profile's model does not have, such as a draft model's."""


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer does with long prefills at one level.

    Attributes:
        layer: Index of the decoder layer.
        heads: This rank's query heads, by their index in the whole layer.
        thresholds: Of this rank's query heads; None if the layer is dense.
        dense_reason: Why it is dense; None if it is sparse.
        calibration: Mean sparsity of this rank's heads by calibrated length, shortest first.
    """

    layer: int
    heads: range
    thresholds: HeadThresholds | None
    dense_reason: Reason | None
    calibration: tuple[tuple[int, float], ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether the layer has no full attention, so that it is vLLM's alone."""
        return self.dense_reason == "local_attention"

    def expected_sparsity(self, kv_len: int) -> float:
        """Sparsity at a context length, interpolated linearly between calibrated lengths."""
        lengths = [length for length, _ in self.calibration]
        upper = min(bisect_left(lengths, kv_len), len(lengths) - 1)
        lower = max(upper - 1, 0)
        (start, low), (stop, high) = self.calibration[lower], self.calibration[upper]
        share = (kv_len - start) / (stop - start) if stop > start else 0.0
        return low + (high - low) * min(max(share, 0.0), 1.0)


def plan_layer(
    profile: Profile | None,
    layer: int,
    num_heads: int,
    rank: int,
    unsupported: Reason | None,
    level: int | None = None,
) -> LayerPlan:
    """Decides what a layer serves at one level.

    Args:
        profile: The admitted profile, if any.
        layer: Index of the decoder layer.
        num_heads: Query heads of this tensor-parallel rank.
        rank: The rank. It holds heads ``[rank * num_heads, (rank + 1) * num_heads)``.
        unsupported: Why this layer cannot run sparse whatever the profile says, or None.
        level: Place of the level in the profile's levels; None for the default level.
    """
    heads = range(rank * num_heads, (rank + 1) * num_heads)
    if unsupported is not None:
        return LayerPlan(layer, heads, None, unsupported)
    if profile is None:
        return LayerPlan(layer, heads, None, "no_profile")
    levels = profile.layers[layer].levels
    level = profile.level_index() if level is None else level
    if not levels or not levels[level].is_sparse:
        return LayerPlan(layer, heads, None, "profile_dense")
    own = levels[level].heads[heads.start : heads.stop]
    return LayerPlan(layer, heads, HeadThresholds.of(own), None, mean_calibration(own))


def plan_layers(
    vllm_config: "VllmConfig", profile: Profile | None, layer_names: list[str], page_size: int
) -> Iterator[tuple[Any, list[LayerPlan]]]:
    """Decides what each attention layer of these names serves at each level.

    Args:
        vllm_config: The worker's configuration.
        profile: The admitted profile, if any.
        layer_names: The layers of one metadata builder.
        page_size: Keys per page of their cache.

    Yields:
        The layer's implementation and its plans, one for each of the profile's levels. Without a
        profile there is one.
    """
    rank, num_ranks = compat.tensor_parallel_rank(), compat.tensor_parallel_size()
    layers = compat.attention_layers(vllm_config, layer_names)
    indices = compat.layer_indices(vllm_config)
    whole_server = eligibility.server_obstacles(vllm_config)
    for name, layer in layers.items():
        impl = compat.attention_impl(layer)
        unsupported: Reason | None = None
        if eligibility.is_local(layer, profile):
            unsupported = "local_attention"
        elif profile is not None:
            place = eligibility.place_obstacles(layer, indices.get(name), profile, num_ranks)
            unsupported = eligibility.first_true(whole_server | place)
            unsupported = unsupported or impl.unsupported_feature(page_size, profile)
        index = indices.get(name, UNKNOWN_LAYER)
        yield (
            impl,
            [
                plan_layer(profile, index, impl.num_heads, rank, unsupported, level)
                for level in range(1 if profile is None else len(profile.levels))
            ],
        )
