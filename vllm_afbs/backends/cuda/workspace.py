"""Memory that sparse prefill takes for the largest step, shown to vLLM while it measures.

vLLM runs the model once, with as many tokens as a step may have, and gives what the GPU then has
left to the KV cache. It passes no metadata in that run, so nothing would be selected and nothing
of ours would be seen. Each sparse layer therefore allocates there what its largest step needs, and
frees it: layers run one after another, so they never need it at the same time.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_afbs.backends.cuda.warmup import LayerShape
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, eligibility

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SCORE_PADDING = 16  # key blocks; rows of scores are padded to whole vectors
_INT, _FLOAT = 4, 4  # bytes
_SCHEDULER_INTS = 4  # that FlashAttention 3 writes for each sequence


@dataclass(frozen=True)
class LargestStep:
    """The step that needs the most memory.

    Attributes:
        num_tokens: Most query tokens of a step.
        num_reqs: Most requests of a step.
        kv_len: Tokens of the longest context that may run sparse.
    """

    num_tokens: int
    num_reqs: int
    kv_len: int


def largest_step(vllm_config: "VllmConfig", profile: Profile) -> LargestStep | None:
    """The largest step that the server may run sparse; None if every context is too short."""
    scheduler = vllm_config.scheduler_config
    longest = min(profile.max_seq_len, int(vllm_config.model_config.max_model_len))
    if longest < profile.min_seq_len or not any(
        level.is_sparse for layer in profile.layers for level in layer.levels
    ):
        return None
    return LargestStep(int(scheduler.max_num_batched_tokens), int(scheduler.max_num_seqs), longest)


def workspace_bytes(shape: LayerShape, step: LargestStep) -> int:
    """Bytes that one layer's sparse prefill holds at once in a step, at most.

    Computed for tiles, which need more than our own kernel. The packed queries and the tiles'
    tables live from selection until the step's dense requests have run. Beside them live the
    scores, then the packed output; or the dense requests' rows; or the dense output that a sampled
    step is compared with. None of the latter two is larger than the packed output.

    Args:
        shape: The layer's shape.
        step: The largest step.
    """
    block_q, block_k = shape.block_q, shape.block_k
    whole_blocks = step.num_tokens // block_q
    # A long prefill has a block of rows or more. Its first and its last block may be partial.
    num_blocks = whole_blocks + 2 * max(min(step.num_reqs, whole_blocks), 1)
    # Scores are freed when the next request's have been allocated, so those of two exist.
    num_scored_blocks = min(whole_blocks + 2 * 2, num_blocks)
    num_k_blocks = -(-step.kv_len // block_k)
    num_tiles = shape.num_heads * num_blocks
    num_packed_rows = shape.num_heads * step.num_tokens
    packed_query = num_packed_rows * shape.head_dim * shape.query_dtype.itemsize
    packed_output = num_packed_rows * shape.head_dim * shape.dtype.itemsize
    pages_per_tile = num_k_blocks * (block_k // shape.page_size)
    tables = _INT * (num_tiles * (pages_per_tile + 2) + 1)
    pooled = num_tiles * (shape.head_dim * shape.dtype.itemsize + _FLOAT)
    padded = -(-num_k_blocks // _SCORE_PADDING) * _SCORE_PADDING
    scores = 2 * _FLOAT * shape.num_heads * num_scored_blocks * padded
    self_similarity = _FLOAT * shape.num_kv_heads * num_k_blocks
    softmax_sums = _FLOAT * num_packed_rows
    scheduler = _INT * (_SCHEDULER_INTS * num_tiles + 1)
    selecting = pooled + scores + self_similarity
    descales = 0
    if shape.cache_dtype != shape.dtype:
        descales = 3 * _FLOAT * (num_tiles + shape.num_kv_heads)
    attending = packed_output + softmax_sums + scheduler + descales
    return packed_query + tables + max(selecting, attending)


def show_workspace(impl: Any, vllm_config: "VllmConfig | None", device: torch.device) -> None:
    """Allocates a layer's workspace and frees it, so that the measured peak of memory holds it.

    Nothing is allocated for a layer that cannot run sparse.

    Args:
        impl: The layer's implementation, before it knows its plan.
        vllm_config: The configuration that the layer was built with; None outside of a server.
        device: The layer's device.
    """
    profile = None if vllm_config is None else admission.admitted_profile(vllm_config)
    if vllm_config is None or profile is None:
        return
    # How vLLM will split pages for the kernels is not known yet.
    page_size = math.gcd(int(vllm_config.cache_config.block_size), profile.block_k)
    whole_server = eligibility.first_true(eligibility.server_obstacles(vllm_config))
    step = largest_step(vllm_config, profile)
    if step is None or whole_server or impl.unsupported_feature(page_size, profile):
        return
    shape = LayerShape.of(impl, profile, vllm_config.model_config, page_size)
    torch.empty(workspace_bytes(shape, step), dtype=torch.uint8, device=device)
