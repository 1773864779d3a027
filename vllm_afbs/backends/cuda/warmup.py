"""Compiles a layer's kernels while the server starts.

Triton compiles a kernel when it is first called, which would be during the first long prompts.
vLLM compiles its own kernels before the server is ready. Its JIT monitor warns about kernels that
are compiled later, or fails (``--jit-monitor-mode``).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from vllm_afbs.backends.cuda.kv_cache import FP8_DTYPES
from vllm_afbs.backends.cuda.sparse import SparsePrefill
from vllm_afbs.kernels import BlockGeometry, StepInputs
from vllm_afbs.kernels.query_blocks import PrefillRequest, cut_query_blocks
from vllm_afbs.profile.schema import Profile


@dataclass(frozen=True)
class LayerShape:
    """What a layer's kernels are compiled for, besides whether any head has a theta.

    Attributes:
        num_heads: Number of query heads of this rank.
        num_kv_heads: Number of KV heads of this rank.
        head_dim: Size of a head.
        dtype: The model's dtype.
        query_dtype: The dtype of queries.
        cache_dtype: The dtype of keys and values.
        page_size: Keys per page.
        block_q: Rows per query block.
        block_k: Keys per key block.
        sinks_dtype: The dtype of the layer's sinks; None if it has none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    query_dtype: torch.dtype
    cache_dtype: torch.dtype
    page_size: int
    block_q: int
    block_k: int
    sinks_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, impl: Any, profile: Profile, model_config: Any, page_size: int) -> "LayerShape":
        """The shape of a layer, by vLLM's implementation and configuration and the profile."""
        dtype = model_config.dtype
        cache_dtype = FP8_DTYPES.get(impl.kv_cache_dtype, dtype)
        return cls(
            num_heads=impl.num_heads,
            num_kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            dtype=dtype,
            query_dtype=cache_dtype if impl.supports_quant_query_input else dtype,
            cache_dtype=cache_dtype,
            page_size=page_size,
            block_q=profile.block_q,
            block_k=profile.block_k,
            sinks_dtype=None if impl.sinks is None else impl.sinks.dtype,
        )


def compile_kernels(
    prefills: Collection[SparsePrefill],
    shape: LayerShape,
    shortest: int,
    longest: int,
    device: torch.device,
) -> None:
    """Runs one query block at every context length that has kernels of its own.

    Args:
        prefills: The layer's sparse prefill with each kernel.
        shape: The layer's shape.
        shortest: Tokens of the shortest context that may run sparse.
        longest: Tokens of the longest context that may run sparse.
        device: The device to compile for.
    """
    num_kept = torch.zeros(shape.num_heads, dtype=torch.int64, device=device)
    for kv_len in lengths_to_compile(shortest, longest, shape.block_k):
        step = _step(shape, kv_len, device)
        for prefill in prefills:
            output = torch.empty_like(step.query, dtype=shape.dtype)
            prefill.attend(step, prefill.choose(step, num_kept), output)


def lengths_to_compile(shortest: int, longest: int, block_k: int) -> Iterator[int]:
    """Context lengths, one for each kernel that contexts between two lengths need.

    Selection rounds the number of key blocks up to a power of two, and each power has a kernel.

    Args:
        shortest: Tokens of the shortest context.
        longest: Tokens of the longest context.
        block_k: Keys per key block.
    """
    row, last = (
        triton.next_power_of_2(triton.cdiv(length, block_k)) for length in (shortest, longest)
    )
    while row <= last:
        yield row * block_k
        row *= 2


def _step(shape: LayerShape, kv_len: int, device: torch.device) -> StepInputs:
    """One query block at the end of a context. All its pages are the same page of zeros."""
    geometry = BlockGeometry(min(shape.block_q, kv_len), kv_len, shape.block_q, shape.block_k)
    query = torch.zeros(
        geometry.q_len, shape.num_heads, shape.head_dim, dtype=shape.query_dtype, device=device
    )
    page = torch.zeros(
        1, shape.num_kv_heads, shape.page_size, 2 * shape.head_dim,
        dtype=shape.cache_dtype, device=device,
    )  # fmt: skip
    key_cache, value_cache = page.transpose(1, 2).split(shape.head_dim, dim=-1)
    num_pages = triton.cdiv(kv_len, shape.page_size)
    sinks = None
    if shape.sinks_dtype is not None:
        sinks = torch.zeros(shape.num_heads, dtype=shape.sinks_dtype, device=device)
    scales = None
    if shape.cache_dtype in FP8_DTYPES.values():
        scales = torch.ones(3, shape.num_kv_heads, device=device)
    return StepInputs(
        query,
        key_cache,
        value_cache,
        torch.zeros(1, num_pages, dtype=torch.int32, device=device),
        cut_query_blocks([PrefillRequest(0, 0, geometry)], device),
        sinks,
        scales,
    )
