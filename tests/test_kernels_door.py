"""Arguments that do not fit are refused at the door, with one line that says what was given."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.batches import make_batch
from tests.problems import SCALE, make_problem
from vllm_afbs.kernels import (
    HeadThresholds,
    PackedTiles,
    StepInputs,
    TileLists,
    TileTables,
    attend_tiles,
    build_tile_lists,
    select_blocks,
    select_tile_lists,
    select_tiles,
    sparse_prefill,
)

BATCH = make_batch([(33, 70), (20, 20)], 32, 16, 16, torch.float32, "cpu")
STEP = BATCH.step
THRESHOLDS = BATCH.problems[0].thresholds
NUM_KEPT = torch.zeros(STEP.num_heads, dtype=torch.int64)
LISTS = build_tile_lists(
    torch.ones(STEP.num_heads, STEP.blocks.num_blocks, STEP.blocks.max_k_blocks).bool()
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": STEP.query[:, :5]}, "num_heads a multiple of num_kv_heads"),
        ({"query": STEP.query[0]}, "query must be"),
        ({"query": STEP.query[..., ::2]}, "head_dim"),
        ({"query": STEP.query[:30]}, "needs 38 query rows"),
        ({"query": STEP.query.half()}, "in the query's dtype torch.float16 or in FP8"),
        ({"query": STEP.query.transpose(0, 2).contiguous().transpose(0, 2)}, "last stride"),
        ({"value_cache": STEP.value_cache[:-1]}, "key_cache and value_cache must both be"),
        ({"value_cache": STEP.value_cache.half()}, "in one dtype"),
        ({"block_table": STEP.block_table.long()}, "int32"),
        ({"block_table": STEP.block_table[0]}, "block_table must be"),
        ({"block_table": STEP.block_table[:, :4]}, "5 pages"),
        ({"block_table": STEP.block_table[:2]}, "in row 2 of the block table"),
        ({"block_table": STEP.block_table.to("meta")}, "block_table must be on cpu"),
        ({"sinks": torch.zeros(5)}, r"sinks must be \[6\], got \[5\]"),
        ({"sinks": torch.zeros(6, device="meta")}, "sinks must be on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit_the_step_are_refused(
    changes: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(STEP, **changes)


@pytest.mark.parametrize("select", [select_tile_lists, select_tiles])
@pytest.mark.parametrize(
    ("thresholds", "num_kept", "message"),
    [
        (HeadThresholds(THRESHOLDS.tau[:5], THRESHOLDS.theta), NUM_KEPT, r"tau must be \[6\]"),
        (THRESHOLDS.to(torch.device("meta")), NUM_KEPT, "on cpu"),
        (THRESHOLDS, NUM_KEPT[:5], "num_kept must be"),
        (THRESHOLDS, NUM_KEPT.int(), "int64"),
    ],
)
def test_selection_refuses_what_does_not_fit_the_heads(
    select: Callable[..., Any], thresholds: HeadThresholds, num_kept: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select(STEP, thresholds, SCALE, num_kept)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(2), r"scales must be \[3, 2\] fp32, got \[2\]"),
        (torch.ones(3, 2).half(), "fp32, got"),
        (torch.ones(3, 1).expand(3, 2), "scales must be contiguous"),
        (torch.ones(3, 2, device="meta"), "scales must be on cpu"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scales: torch.Tensor, message: str) -> None:
    key, value = (cache.to(torch.float8_e4m3fn) for cache in (STEP.key_cache, STEP.value_cache))
    step = replace(STEP, key_cache=key, value_cache=value)
    with pytest.raises(ValueError, match=message):
        replace(step, scales=scales)


def test_scales_of_what_is_not_fp8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of caches in FP8, got .* torch\.float32"):
        replace(STEP, scales=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"in the query's dtype torch\.float8_e4m3fn or in FP8"):
        replace(STEP, query=STEP.query.to(torch.float8_e4m3fn))


def odd_step() -> StepInputs:
    return make_batch([(48, 48)], 24, 24, 16, torch.float32, "cpu").step


def test_triton_refuses_blocks_that_it_cannot_cut() -> None:
    step = odd_step()
    for select in (select_tile_lists, select_tiles):
        with pytest.raises(ValueError, match="block_q must be a power of two"):
            select(step, THRESHOLDS, SCALE, NUM_KEPT)
    lists = select_tile_lists(step, THRESHOLDS, SCALE, NUM_KEPT.clone(), implementation="torch")
    with pytest.raises(ValueError, match="block_q must be a power of two"):
        sparse_prefill(step, lists, torch.empty_like(step.query), SCALE)


def test_tiles_need_pages_that_fit_blocks() -> None:
    step = make_batch([(64, 64)], 32, 48, 16, torch.float32, "cpu").step
    with pytest.raises(ValueError, match="page_size must divide block_k"):
        select_tiles(step, THRESHOLDS, SCALE, NUM_KEPT)


@pytest.mark.parametrize(
    ("lists", "output", "message"),
    [
        (LISTS, STEP.query[:-1], "output must be"),
        (TileLists(LISTS.block_lists[1:], LISTS.counts), STEP.query, "tiles"),
        (TileLists(LISTS.block_lists, LISTS.counts[1:]), STEP.query, "counts"),
    ],
)
def test_prefill_refuses_what_does_not_fit_the_step(
    lists: TileLists, output: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sparse_prefill(STEP, lists, output.clone(), SCALE)


@pytest.mark.parametrize("rows", [(29, 60), (30, 59)])
def test_one_request_must_have_the_rows_of_its_geometry(rows: tuple[int, int]) -> None:
    problem = make_problem(30, 60, 16, 16)
    query, key = problem.query[: rows[0]], problem.key[: rows[1]]
    with pytest.raises(ValueError, match="q_len=30 and kv_len=60"):
        select_blocks(query, key, problem.thresholds, problem.geometry, SCALE)


def test_tiles_of_a_step_with_sinks_need_log_sum_exps() -> None:
    step = replace(STEP, sinks=torch.zeros(6))
    rows = STEP.num_heads * STEP.blocks.num_rows
    entries = torch.zeros(STEP.num_tiles + 1, 1, dtype=torch.int32)
    tables = TileTables(entries[:, 0], entries[1:, 0], entries)
    tiles = PackedTiles(torch.zeros(rows, 1, 16), tables)
    with pytest.raises(ValueError, match="must return log-sum-exps"):
        attend_tiles(step, tiles, torch.empty_like(STEP.query), lambda *_: None)


def test_tiles_of_another_step_are_refused() -> None:
    entries = torch.zeros(3, 1, dtype=torch.int32)
    tiles = PackedTiles(STEP.query[:3, :1], TileTables(entries[:, 0], entries[:2, 0], entries))
    with pytest.raises(ValueError, match="tiles must hold"):
        attend_tiles(STEP, tiles, torch.empty_like(STEP.query), lambda *_: None)
