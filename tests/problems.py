"""Small attention problems and a plain dense paged kernel to run tiles on."""

from dataclasses import dataclass

import torch

from vllm_afbs.kernels import BlockGeometry, HeadThresholds, TileTables

SCALE = 0.35


@dataclass
class Problem:
    """One request with a shuffled page table."""

    geometry: BlockGeometry
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    thresholds: HeadThresholds
    pages: torch.Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]


def make_problem(
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    page_size: int | None = None,
    seed: int = 0,
) -> Problem:
    """Draws a problem whose keys cluster by block, so that selection has something to find."""
    generator = torch.Generator().manual_seed(seed)
    num_heads = num_kv_heads * group
    geometry = BlockGeometry(q_len, kv_len, block_q, block_k)
    centres = torch.randn(geometry.num_k_blocks, num_kv_heads, head_dim, generator=generator)
    key = centres.repeat_interleave(block_k, 0)[:kv_len]
    key = key + torch.randn(key.shape, generator=generator) * torch.rand(
        kv_len, 1, 1, generator=generator
    )
    num_pages = -(-kv_len // (page_size or block_k))
    return Problem(
        geometry,
        torch.randn(q_len, num_heads, head_dim, generator=generator) * 2,
        key,
        torch.randn(key.shape, generator=generator),
        HeadThresholds(
            torch.rand(num_heads, generator=generator).clamp_min(0.05),
            torch.rand(num_heads, generator=generator) * 1.2 - 0.6,
        ),
        torch.randperm(num_pages + 3, generator=generator)[:num_pages],
    )


def relative_l1(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Error of an output relative to the fp64 expectation."""
    return float((output.double() - expected).abs().sum() / expected.abs().sum())


class PagedDense:
    """Dense causal attention through block tables, sequence by sequence in fp64."""

    def __init__(
        self, key: torch.Tensor, value: torch.Tensor, scales: torch.Tensor | None = None
    ) -> None:
        """Takes caches of one KV head, ``[num_pages, page_size, head_dim]``, and tiles' scales."""
        self.key, self.value, self.scales = key, value, scales

    @classmethod
    def of(cls, problem: Problem, page_size: int) -> "PagedDense":
        """Lays K and V out as ``[pages * num_kv_heads, page_size, head_dim]``; free slots NaN."""
        num_pages = int(problem.pages.max()) + 1
        return cls(
            *(
                cls._paged(rows, problem.pages, num_pages, page_size)
                for rows in (problem.key, problem.value)
            )
        )

    @staticmethod
    def _paged(
        rows: torch.Tensor, pages: torch.Tensor, num_pages: int, page_size: int
    ) -> torch.Tensor:
        length, num_kv_heads, head_dim = rows.shape
        cache = torch.full(
            (num_pages, page_size, num_kv_heads, head_dim), torch.nan, dtype=torch.float64
        )
        for position in range(length):
            page = pages[position // page_size]
            cache[page, position % page_size] = rows[position].double()
        return cache.transpose(1, 2).reshape(-1, page_size, head_dim)

    def __call__(
        self, query: torch.Tensor, output: torch.Tensor, tables: TileTables
    ) -> torch.Tensor:
        """Attends; see ``DensePagedAttention``."""
        lse = torch.empty(len(query))
        page_size = self.key.shape[1]
        starts = tables.query_start_loc.tolist()
        for i, kv_len in enumerate(tables.seq_lens.tolist()):
            rows = query[starts[i] : starts[i + 1], 0].double()
            pages = tables.block_table[i, : -(-kv_len // page_size)].long()
            key = self.key[pages].flatten(0, 1)[:kv_len].double()
            value = self.value[pages].flatten(0, 1)[:kv_len].double()
            if self.scales is not None:
                rows, key, value = (
                    part * scale
                    for part, scale in zip(
                        (rows, key, value), self.scales[:, i].double(), strict=True
                    )
                )
            causal = torch.ones(len(rows), kv_len).tril(kv_len - len(rows)).bool()
            scores = (rows @ key.T * SCALE).masked_fill(~causal, -torch.inf)
            output[starts[i] : starts[i + 1], 0] = (torch.softmax(scores, -1) @ value).to(
                output.dtype
            )
            lse[starts[i] : starts[i + 1]] = torch.logsumexp(scores, -1)
        return lse
