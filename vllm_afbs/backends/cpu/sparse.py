"""One layer's sparse prefill on the CPU: scores blocks, selects some, and attends in tiles."""

from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops

from vllm_afbs.backends.cpu.key_pages import key_page_reader
from vllm_afbs.kernels import (
    HeadThresholds,
    TileTables,
    build_tile_lists,
    build_tile_tables,
    select_blocks,
    tile_prefill,
)
from vllm_afbs.kernels.query_blocks import PrefillRequest

MAX_DENSITY = 0.9
"""If a larger share of blocks is kept, vLLM's dense backend runs: tiles would save nothing."""


@dataclass(frozen=True)
class CacheFormat:
    """How vLLM's CPU kernels lay out the cache of a layer.

    Attributes:
        isa: vLLM's name for the kernels in use.
        page_size: Keys per page.
        dtype: The dtype of queries and cache.
    """

    isa: str
    page_size: int
    dtype: torch.dtype


class SparsePrefill:
    """Selects blocks for one layer, and attends to them."""

    def __init__(
        self,
        thresholds: HeadThresholds,
        num_kv_heads: int,
        head_dim: int,
        softmax_scale: float,
        cache_format: CacheFormat,
        softcap: float = 0.0,
    ) -> None:
        """Prepares a layer.

        Args:
            thresholds: The thresholds of this rank's query heads.
            num_kv_heads: Number of KV heads of this rank.
            head_dim: Size of a head.
            softmax_scale: Factor of the scores.
            cache_format: The layout of the cache.
            softcap: Bound of the scores; 0 for no bound.

        Raises:
            UnknownPackingError: vLLM's kernels pack K in a way that is not known.
        """
        self._thresholds = thresholds
        self._num_kv_heads, self._head_dim = num_kv_heads, head_dim
        self._softmax_scale, self._softcap = softmax_scale, softcap
        self._format = cache_format
        self._reader = key_page_reader(
            cache_format.isa, cache_format.page_size, head_dim, cache_format.dtype
        )

    def can_read(self, kv_cache: torch.Tensor) -> bool:
        """Whether a cache has the shape, strides and dtype that this class reads."""
        page = (self._num_kv_heads, self._format.page_size, 2 * self._head_dim)
        return (
            kv_cache.ndim == 4
            and tuple(kv_cache.shape[1:]) == page
            and kv_cache.is_contiguous()
            and kv_cache.dtype == self._format.dtype
        )

    def select(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        request: PrefillRequest,
        pages: torch.Tensor,
    ) -> torch.Tensor:
        """Chooses a request's key blocks.

        Args:
            query: The step's queries, ``[num_tokens, num_heads, head_dim]``.
            kv_cache: The layer's cache, this step's keys included,
                ``[num_pages, num_kv_heads, page_size, 2 * head_dim]``.
            request: The request.
            pages: The request's row of the block table.

        Returns:
            The kept blocks, ``[num_heads, num_q_blocks, num_k_blocks]``, bool.
        """
        geometry = request.geometry
        num_pages = -(-geometry.kv_len // self._format.page_size)
        key = self._reader.read(split_cache(kv_cache)[0], pages[:num_pages])
        context = key.flatten(1, 2).transpose(0, 1)[: geometry.kv_len]
        return select_blocks(
            query[request.rows], context, self._thresholds, geometry, self._softmax_scale
        )

    def tables(
        self, keep: torch.Tensor, request: PrefillRequest, pages: torch.Tensor
    ) -> TileTables:
        """Arranges a request's kept blocks in tiles."""
        lists = build_tile_lists(keep)
        return build_tile_tables(
            lists, request.geometry, pages, self._format.page_size, self._num_kv_heads
        )

    def attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        kv_cache: torch.Tensor,
        request: PrefillRequest,
        tables: TileTables,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Attends to a request's kept blocks, into its rows of ``output``.

        Args:
            query: As in ``select``.
            output: Like ``query``.
            kv_cache: As in ``select``.
            request: The request.
            tables: From ``tables``.
            sinks: A logit of each query head that takes part in every row's softmax and has no
                value, ``[num_heads]``; None for none.
        """
        num_pages, num_kv_heads, page_size, width = kv_cache.shape
        one_head = kv_cache.view(num_pages * num_kv_heads, 1, page_size, width)

        def dense(query: torch.Tensor, output: torch.Tensor, tables: TileTables) -> None:
            if sinks is None:
                self._run_tiles(query, output, one_head, tables, None)
                return
            # The kernel takes one sink for each head of a call, and all tiles are of one head.
            num_heads = len(sinks)
            parts = zip(
                query.chunk(num_heads), output.chunk(num_heads), tables.by_head(num_heads),
                sinks.float().split(1), strict=True,
            )  # fmt: skip
            for head_query, head_output, head_tables, sink in parts:
                self._run_tiles(head_query, head_output, one_head, head_tables, sink)

        tile_prefill(query[request.rows], output[request.rows], tables, dense)

    def _run_tiles(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        kv_cache: torch.Tensor,
        tables: TileTables,
        sink: torch.Tensor | None,
    ) -> None:
        dense_paged_attention(
            query, output, kv_cache, tables, self._softmax_scale, self._format, self._softcap, sink
        )


def dense_paged_attention(
    query: torch.Tensor,
    output: torch.Tensor,
    kv_cache: torch.Tensor,
    tables: TileTables,
    softmax_scale: float,
    cache_format: CacheFormat,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Runs the dense causal kernel that vLLM's CPU_ATTN runs.

    Args:
        query: ``[num_rows, num_heads, head_dim]``.
        output: Like ``query``; written.
        kv_cache: ``[num_pages, num_kv_heads, page_size, 2 * head_dim]``.
        tables: The sequences.
        softmax_scale: Factor of the scores.
        cache_format: The cache's layout.
        softcap: Bound of the scores; 0 for no bound.
        sinks: A sink of each head, ``[num_heads]``, fp32; None for none.
    """
    key_cache, value_cache = split_cache(kv_cache)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(tables.seq_lens),
        num_heads=query.shape[1],
        num_kv_heads=kv_cache.shape[1],
        head_dim=query.shape[2],
        seq_lens=tables.seq_lens,
        dtype=query.dtype,
        query_start_loc=tables.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=cache_format.isa,
        enable_kv_split=True,
    )
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=tables.query_start_loc,
        seq_lens=tables.seq_lens,
        scale=softmax_scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=tables.block_table,
        softcap=softcap,
        scheduler_metadata=schedule,
        s_aux=sinks,
    )


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as vLLM's kernels take them, ``[num_pages, num_kv_heads, page_size, head_dim]``."""
    num_pages, num_kv_heads, page_size, width = kv_cache.shape
    key, value = kv_cache.view(num_pages, num_kv_heads, 2 * page_size, width // 2).chunk(2, dim=2)
    return key, value
