"""The tensors of one layer in one step, and what a model asks of attention.

``StepInputs`` is the door for everything that runs on a step: it checks its tensors once, by facts
that the host knows (shapes, dtypes, strides, devices), and the kernels behind it rely on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_afbs.kernels.query_blocks import PrefillRequest, QueryBlocks

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class StepInputs:
    """A layer's tensors in one step.

    Attributes:
        query: ``[num_tokens, num_heads, head_dim]``, the step's rows, any strides but the last; in
            FP8 only if the caches are.
        key_cache: ``[num_pages, page_size, num_kv_heads, head_dim]``, this step's keys included,
            any strides but the last; in the query's dtype or in FP8.
        value_cache: Like ``key_cache``, with strides of its own.
        block_table: ``[num_reqs, max_pages]``, int32, the pages of each request's context.
        blocks: The query blocks of the step's long prefills.
        sinks: A logit of each query head that takes part in every row's softmax and has no value,
            ``[num_heads]``, any float dtype; None for none.
        scales: What FP8 numbers are multiplied by: the query heads of each KV head, its keys and
            its values, ``[3, num_kv_heads]``, fp32, contiguous. A query in another dtype has
            scales of 1. None if all scales are 1.

    Raises:
        ValueError: A tensor has another shape, dtype, stride or device than stated above, or
            ``query`` or ``block_table`` is too short for the requests of ``blocks``.
    """

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    blocks: QueryBlocks
    sinks: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        query, key, value, table = self.query, self.key_cache, self.value_cache, self.block_table
        check_heads(query.shape, key.shape[1:])
        if key.ndim != 4 or value.shape != key.shape or value.dtype != key.dtype:
            raise ValueError(
                "key_cache and value_cache must both be [num_pages, page_size, num_kv_heads, "
                f"head_dim] in one dtype, got {_kind(key)} and {_kind(value)}"
            )
        if key.dtype != query.dtype and key.dtype not in FP8:
            raise ValueError(
                f"key_cache must be in the query's dtype {query.dtype} or in FP8, got {key.dtype}"
            )
        if table.ndim != 2 or table.dtype != torch.int32:
            raise ValueError(f"block_table must be [num_reqs, max_pages] int32, got {_kind(table)}")
        tensors = {"query": query, "key_cache": key, "value_cache": value, "block_table": table}
        if self.sinks is not None:
            if self.sinks.shape != query.shape[1:2]:
                raise ValueError(f"sinks must be [{query.shape[1]}], got {_kind(self.sinks)}")
            tensors["sinks"] = self.sinks
        if self.scales is not None:
            shape = (3, key.shape[2])
            if self.scales.shape != shape or self.scales.dtype != torch.float32:
                raise ValueError(f"scales must be {list(shape)} fp32, got {_kind(self.scales)}")
            if key.dtype not in FP8 or not self.scales.is_contiguous():
                raise ValueError(
                    "scales must be contiguous and of caches in FP8, got strides "
                    f"{self.scales.stride()} and {key.dtype}"
                )
            tensors["scales"] = self.scales
        for name, tensor in tensors.items():
            if tensor.stride(-1) != 1:
                raise ValueError(f"{name}'s last stride must be 1, got {tensor.stride()}")
            if tensor.device != self.blocks.table.device:
                raise ValueError(
                    f"{name} must be on {self.blocks.table.device}, as the query blocks are, "
                    f"got {tensor.device}"
                )
        for request in self.blocks.requests:
            num_pages = -(-request.geometry.kv_len // key.shape[1])
            if (
                request.rows.stop > len(query)
                or request.table_row >= len(table)
                or num_pages > table.shape[1]
            ):
                raise ValueError(
                    f"a request needs {request.rows.stop} query rows and {num_pages} pages in row "
                    f"{request.table_row} of the block table, got query {_kind(query)} and "
                    f"block_table {_kind(table)}"
                )

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Dtype in which matrix units take queries, their means and what they are multiplied with.

        fp16 holds every FP8 number exactly, and GPUs convert to it in one instruction.
        """
        return torch.float16 if self.query.dtype in FP8 else self.query.dtype

    @property
    def tile_scales(self) -> torch.Tensor | None:
        """Scales of each tile's query, keys and values, ``[3, num_tiles, 1]``; None for 1.

        A dense paged kernel takes them for sequences of one head.
        """
        if self.scales is None:
            return None
        tiles_per_kv_head = self.num_tiles // self.key_cache.shape[2]
        return self.scales.repeat_interleave(tiles_per_kv_head, dim=1)[..., None]

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def num_tiles(self) -> int:
        """Query blocks of all query heads."""
        return self.query.shape[1] * self.blocks.num_blocks

    @property
    def page_size(self) -> int:
        """Keys of a page."""
        return self.key_cache.shape[1]

    @property
    def tile_page_size(self) -> int:
        """Keys of a page of tiles' block tables: a whole page of the cache, or a key block in it.

        Raises:
            ValueError: Neither do key blocks consist of whole pages nor pages of whole key blocks.
        """
        page_size, block_k = self.page_size, self.blocks.block_k
        if block_k % page_size and page_size % block_k:
            raise ValueError(
                f"page_size must divide block_k {block_k} or be a multiple of it, got {page_size}"
            )
        return min(page_size, block_k)

    def each_request(
        self,
    ) -> Iterator[tuple[PrefillRequest, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields each request's tensors as implementations for one request take them.

        This copies every context out of the cache, so no kernel on a device uses it.

        Yields:
            The request; its blocks among those of the step; its rows of the query,
            ``[q_len, num_heads, head_dim]``; its keys and its values,
            ``[kv_len, num_kv_heads, head_dim]``. The step has its query blocks in reverse:
            see ``QueryBlocks``. Where there are scales, keys are multiplied by theirs and the
            query's, and values by theirs.
        """
        for request, span in zip(self.blocks.requests, self.blocks.slices, strict=True):
            kv_len = request.geometry.kv_len
            pages = self.block_table[request.table_row, : -(-kv_len // self.page_size)].long()
            key, value = (
                cache[pages].flatten(0, 1)[:kv_len] for cache in (self.key_cache, self.value_cache)
            )
            if self.scales is not None:
                of_query, of_key, of_value = self.scales.double()[:, None, :, None]
                key, value = key.double() * (of_query * of_key), value.double() * of_value
            yield request, span, self.query[request.rows].to(self.matmul_dtype), key, value


def check_heads(query: torch.Size, key: torch.Size) -> None:
    """Checks the shapes of a query and of the keys that it is to meet.

    Raises:
        ValueError: They are not ``[rows, num_heads, head_dim]`` and ``[rows, num_kv_heads,
            head_dim]`` with ``num_heads`` a multiple of ``num_kv_heads``.
    """
    if len(query) != 3 or len(key) != 3 or query[2] != key[2] or query[1] % key[1]:
        raise ValueError(
            "query must be [rows, num_heads, head_dim] and keys [rows, num_kv_heads, head_dim], "
            f"num_heads a multiple of num_kv_heads, got {list(query)} and {list(key)}"
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
