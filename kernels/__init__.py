"""Block-sparse attention: its contract, its oracle and its fast implementations.

``api`` holds the operations and says which implementations each one has; ``reference`` is the
oracle, plain loops in fp64; ``impl`` holds the fast ones. The other modules are what goes in and
comes out: ``geometry`` cuts one request into blocks, ``query_blocks`` writes a step's blocks as a
table for a device, ``step`` holds a step's tensors, ``thresholds`` the selection rule's parameters,
``tiles`` the chosen blocks. Nothing here imports vLLM.
"""

from vllm_afbs.kernels.api import (
    attend_tiles,
    select_blocks,
    select_tile_lists,
    select_tiles,
    sparse_prefill,
)
from vllm_afbs.kernels.geometry import LOCAL_KEYS, BlockGeometry
from vllm_afbs.kernels.impl.one_head_view import one_head_view, view_steps
from vllm_afbs.kernels.impl.torch_selection import (
    BlockScores,
    cut_keys,
    pool_keys,
    pool_queries,
    score_blocks,
)
from vllm_afbs.kernels.impl.torch_tiles import build_tile_tables, tile_prefill
from vllm_afbs.kernels.query_blocks import PrefillRequest, QueryBlocks, cut_query_blocks
from vllm_afbs.kernels.step import StepInputs
from vllm_afbs.kernels.thresholds import MEAN_KEY_SHARE, THETA_OFF, HeadThresholds
from vllm_afbs.kernels.tiles import PackedTiles, TileLists, TileTables, build_tile_lists

__all__ = [
    "LOCAL_KEYS",
    "MEAN_KEY_SHARE",
    "THETA_OFF",
    "BlockGeometry",
    "BlockScores",
    "HeadThresholds",
    "PackedTiles",
    "PrefillRequest",
    "QueryBlocks",
    "StepInputs",
    "TileLists",
    "TileTables",
    "attend_tiles",
    "build_tile_lists",
    "build_tile_tables",
    "cut_keys",
    "cut_query_blocks",
    "one_head_view",
    "pool_keys",
    "pool_queries",
    "score_blocks",
    "select_blocks",
    "select_tile_lists",
    "select_tiles",
    "sparse_prefill",
    "tile_prefill",
    "view_steps",
]
