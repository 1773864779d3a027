"""What the metadata builder gives layers: what they serve, and the metadata of each step."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

from vllm_afbs.backends.cuda.dispatch import KernelChoice
from vllm_afbs.backends.cuda.meter import DeviceMeter
from vllm_afbs.backends.cuda.sparse import SparsePrefill
from vllm_afbs.kernels import QueryBlocks
from vllm_afbs.serving.batch import DenseRequests
from vllm_afbs.serving.plan import LayerPlan


@dataclass(kw_only=True)
class AfbsCUDAMetadata(FlashAttentionMetadata):
    """FlashAttention's metadata of a whole step that has long prefills, and what these need.

    Attributes:
        blocks: The query blocks of the long prefills.
        meter: Where the layers report their work. With microbatching vLLM gives each microbatch a
            builder, and runs one microbatch's layers between those of another.
        level: Place of the level that all layers serve, in the profile's levels.
        dense_requests: The other requests; None if there are none.
    """

    blocks: QueryBlocks
    meter: DeviceMeter
    level: int
    dense_requests: DenseRequests | None = None


@dataclass(frozen=True)
class ServedLayer:
    """What the metadata builder gives a layer for one level before its first step.

    Attributes:
        plan: The layer's thresholds at the level, or why it runs dense.
        slot: The layer's place among those of the builder, and in its meter.
        prefills: The layer's sparse prefill by kernel; empty if the layer runs dense.
        always_sparse: Whether it also runs sparse where dense is expected to be faster.
    """

    plan: LayerPlan
    slot: int
    prefills: Mapping[KernelChoice, SparsePrefill]
    always_sparse: bool = False
