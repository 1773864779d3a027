"""Block-sparse attention: the specification and its fast implementations.

``reference`` says what is computed, in plain fp64 loops. ``selection`` chooses key blocks,
vectorised. ``tiles`` runs the choice on the platform's own dense paged kernel. ``query_blocks``
lists a step's work for a device, where ``triton_packing``, ``triton_scoring`` and
``triton_selection`` prepare tiles or block lists, and ``triton_prefill`` attends to the latter.
Nothing here imports vLLM.
"""

from vllm_afbs.kernels.geometry import LOCAL_BLOCKS, BlockGeometry
from vllm_afbs.kernels.impl.torch_selection import (
    HeadThresholds,
    cut_keys,
    pool_keys,
    pool_queries,
    score_blocks,
    select_blocks,
)
from vllm_afbs.kernels.impl.torch_tiles import (
    TileLists,
    TileTables,
    build_tile_lists,
    build_tile_tables,
    tile_prefill,
)

__all__ = [
    "LOCAL_BLOCKS",
    "BlockGeometry",
    "HeadThresholds",
    "TileLists",
    "TileTables",
    "build_tile_lists",
    "build_tile_tables",
    "cut_keys",
    "pool_keys",
    "pool_queries",
    "score_blocks",
    "select_blocks",
    "tile_prefill",
]
