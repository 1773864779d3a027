"""The kind of GPU that a layer runs on, and what that GPU's kernels allow."""

from dataclasses import dataclass

import triton

from vllm_afbs.backends.cuda.dispatch import is_measured
from vllm_afbs.backends.cuda.sparse import MAX_TILE_ROWS
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving.reasons import Reason

_LEAST_BLOCK = 16  # smallest side of a matrix product in Triton
_MAX_BLOCK_ELEMENTS = 128 * 256
"""Largest block that fits into shared memory, each row padded to a power of two. Scoring holds two
blocks of keys and 128 pooled queries there. Our attention kernel holds one block of queries and
parts of a block of keys."""
_SMALL_CAPABILITIES = (86, 89, 120, 121)
"""GPUs with 99 KB of shared memory, by the CUDA C++ programming guide."""
_MAX_SMALL_BLOCK_ELEMENTS, _MAX_SMALL_HEAD_DIM = 128 * 128, 128


@dataclass(frozen=True)
class Card:
    """A kind of GPU, by what decides which kernels it has.

    Attributes:
        capability: Compute capability, 90 for 9.0; 0 if there is no GPU.
        flash_attention_version: The version of FlashAttention that runs dense attention; None if
            there is none.
    """

    capability: int
    flash_attention_version: int | None

    @classmethod
    def of_worker(cls, flash_attention_version: int | None) -> "Card":
        """This worker's GPU, beside a version of FlashAttention."""
        from vllm.platforms import current_platform

        found = current_platform.get_device_capability()
        return cls(0 if found is None else int(found.to_int()), flash_attention_version)

    @property
    def name(self) -> str:
        """Its name in ``measured.json``."""
        return f"sm{self.capability}-fa{self.flash_attention_version}"

    def obstacles(self, head_dim: int, profile: Profile | None) -> dict[Reason, bool]:
        """The conditions of a GPU, each with whether it keeps a layer from running sparse.

        Args:
            head_dim: Size of the layer's heads.
            profile: The served profile.
        """
        return {
            "unmeasured_gpu": not is_measured(self.name),
            "block_size": profile is not None
            and not can_cut(profile.block_q, profile.block_k, head_dim, self.capability),
        }


def can_cut(block_q: int, block_k: int, head_dim: int, capability: int) -> bool:
    """Whether the kernels on CUDA support blocks of these sizes.

    The sizes have to be powers of two. A query block must not be larger than a tile, and each block
    has to fit into shared memory.

    Args:
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        head_dim: Size of a head.
        capability: Compute capability of the GPU, 90 for 9.0.
    """
    blocks = (block_q, block_k)
    powers = all(block >= _LEAST_BLOCK and block & (block - 1) == 0 for block in blocks)
    elements = max(blocks) * triton.next_power_of_2(head_dim)
    fits = elements <= _MAX_BLOCK_ELEMENTS
    if capability in _SMALL_CAPABILITIES:
        fits = elements <= _MAX_SMALL_BLOCK_ELEMENTS and head_dim <= _MAX_SMALL_HEAD_DIM
    return powers and block_q <= MAX_TILE_ROWS and fits
