"""Tile tables on the device, in one launch; ``tiles`` says what they are."""

import torch
import triton
import triton.language as tl

from vllm_afbs.kernels.geometry import BlockGeometry
from vllm_afbs.kernels.tiles import TileLists, TileTables
from vllm_afbs.kernels.triton_geometry import block_span


def build_tile_tables_on_device(
    lists: TileLists,
    geometry: BlockGeometry,
    pages: torch.Tensor,
    page_size: int,
    num_kv_heads: int,
) -> TileTables:
    """Does what ``tiles.build_tile_tables`` does; see there.

    Args:
        lists: The tiles' kept blocks.
        geometry: The step's blocks.
        pages: The request's pages in the order of its context, int32.
        page_size: Keys of a page; divides ``geometry.block_k``.
        num_kv_heads: KV heads of the cache.

    Raises:
        ValueError: ``page_size`` does not divide ``geometry.block_k``.
    """
    pages_per_block = geometry.pages_per_block(page_size)
    num_tiles, longest = lists.block_lists.shape
    # A kernel may fetch entries ahead of a tile's end, so what follows names a valid page.
    block_table = lists.counts.new_zeros(num_tiles, longest * pages_per_block)
    seq_lens = lists.counts.new_empty(num_tiles)
    query_start_loc = lists.counts.new_empty(num_tiles + 1)
    _write_table[(num_tiles,)](
        lists.block_lists, lists.counts, pages, block_table, seq_lens, query_start_loc,
        geometry.q_len, geometry.kv_len, geometry.num_q_blocks, num_tiles, longest,
        num_kv_heads,
        group=num_tiles // geometry.num_q_blocks // num_kv_heads,
        BLOCK_Q=geometry.block_q,
        BLOCK_K=geometry.block_k,
        PAGES_PER_BLOCK=pages_per_block,
        CHUNK=256,
        num_warps=4,
    )  # fmt: skip
    return TileTables(query_start_loc, seq_lens, block_table)


@triton.jit
def _write_table(
    block_lists, counts, pages, block_table, seq_lens, query_start_loc,
    q_len, kv_len, num_q_blocks, num_tiles, longest, num_kv_heads, group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PAGES_PER_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tile // num_q_blocks
    _, first_position, last_position = block_span(tile % num_q_blocks, q_len, kv_len, BLOCK_Q)
    count = tl.load(counts + tile)

    # Only whole blocks are dropped: the one that the last row ends in is on the diagonal.
    dropped = last_position // BLOCK_K + 1 - count
    tl.store(seq_lens + tile, last_position + 1 - dropped * BLOCK_K)
    tl.store(query_start_loc + tile, head * q_len + first_position - (kv_len - q_len))
    tl.store(query_start_loc + num_tiles, (num_tiles // num_q_blocks) * q_len)

    last_page = (kv_len + BLOCK_K // PAGES_PER_BLOCK - 1) // (BLOCK_K // PAGES_PER_BLOCK) - 1
    block_list = block_lists + tile.to(tl.int64) * longest
    table = block_table + tile.to(tl.int64) * longest * PAGES_PER_BLOCK
    for start in range(0, count * PAGES_PER_BLOCK, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < count * PAGES_PER_BLOCK
        block = tl.load(block_list + place // PAGES_PER_BLOCK, mask=inside, other=0)
        index = tl.minimum(block * PAGES_PER_BLOCK + place % PAGES_PER_BLOCK, last_page)
        page = tl.load(pages + index, mask=inside, other=0)
        tl.store(table + place, page * num_kv_heads + head // group, mask=inside)
