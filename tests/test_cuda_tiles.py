"""What a layer on CUDA reads and what it asks of FlashAttention, without a GPU.

FlashAttention is made up: it attends in fp64 to what its arguments say. Triton's kernels around it
run in Triton's interpreter.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.batches import Batch, draw_sinks, make_batch, quantise
from tests.interpreted import INTERPRETED, assert_passes_interpreted
from tests.problems import SCALE, relative_l1
from vllm_afbs import compat
from vllm_afbs.backends.cuda.kv_cache import is_readable, step_inputs
from vllm_afbs.backends.cuda.sparse import Layer, TilePrefill
from vllm_afbs.kernels import build_tile_lists, sparse_prefill
from vllm_afbs.kernels.reference import reference_attention, reference_select

FP8 = torch.float8_e4m3fn
SOFTCAP = 5.0


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor,
    cu_seqlens_q: torch.Tensor, max_seqlen_q: int, seqused_k: torch.Tensor, max_seqlen_k: int,
    softmax_scale: float, softcap: float, causal: bool, block_table: torch.Tensor,
    fa_version: int, num_splits: int, return_softmax_lse: bool,
    q_descale: torch.Tensor | None = None, k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Is vLLM's ``flash_attn_varlen_func``: no sinks, and scales of [num_seqs, num_kv_heads]."""
    assert causal
    assert return_softmax_lse
    assert (fa_version, num_splits, k.shape[2]) == (3, 1, 1)
    assert max_seqlen_q >= int(cu_seqlens_q.diff().max())
    assert max_seqlen_k >= int(seqused_k.max())
    scales = [torch.ones(len(seqused_k), 1) if each is None else each
              for each in (q_descale, k_descale, v_descale)]  # fmt: skip
    assert all(each.shape == (len(seqused_k), 1) for each in scales)
    lse = torch.empty(q.shape[1], len(q))
    starts = cu_seqlens_q.tolist()
    for i, kv_len in enumerate(seqused_k.tolist()):
        pages = block_table[i, : -(-kv_len // k.shape[1])].long()
        rows, key, value = (
            part.double() * scale[i].double()
            for part, scale in zip(
                (q[starts[i] : starts[i + 1], 0], k[pages].flatten(0, 1)[:kv_len, 0],
                 v[pages].flatten(0, 1)[:kv_len, 0]), scales, strict=True,
            )
        )  # fmt: skip
        scores = rows @ key.T * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        seen = torch.ones(len(rows), kv_len).tril(kv_len - len(rows)).bool()
        scores = scores.masked_fill(~seen, -torch.inf)
        out[starts[i] : starts[i + 1], 0] = (torch.softmax(scores, -1) @ value).to(out.dtype)
        lse[0, starts[i] : starts[i + 1]] = torch.logsumexp(scores, -1)
    return out, lse


def expected_rows(batch: Batch, softcap: float) -> list[tuple[slice, torch.Tensor]]:
    """Each request's rows of the output, and what the reference gives for them."""
    found = []
    for request in batch.blocks.requests:
        problem = batch.problems[request.table_row - 1]
        parts = (problem.query, problem.key, problem.value)
        keep = reference_select(*parts[:2], batch.problems[0].thresholds, problem.geometry, SCALE)
        expected, _ = reference_attention(
            *parts, keep, problem.geometry, SCALE, softcap=softcap, sinks=batch.sinks
        )
        found.append((request.rows, expected))
    return found


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_this_module_passes_in_the_interpreter() -> None:
    assert_passes_interpreted(__file__)


@pytest.mark.skipif(not INTERPRETED, reason="run in a process of its own, by the first test")
@pytest.mark.parametrize(
    ("is_fp8", "per_head", "has_sinks", "softcap"),
    [(False, False, False, 0.0), (False, False, True, 0.0), (True, False, False, 0.0),
     (True, True, True, SOFTCAP)],
)  # fmt: skip
def test_interpreted_tiles_ask_for_what_the_layer_is(
    is_fp8: bool, per_head: bool, has_sinks: bool, softcap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "flash_attention", lambda: flash_attention)
    batch = make_batch([(50, 131), (20, 20)], 32, 16, 16, torch.float16, "cpu", True)
    if is_fp8:
        quantise(batch, FP8, True, per_head)
    batch.sinks = draw_sinks(6, "cpu") if has_sinks else None
    prefill = TilePrefill(Layer(batch.problems[0].thresholds, SCALE, softcap))
    step, num_kept = batch.step, torch.zeros(6, dtype=torch.int64)
    output = torch.full_like(batch.query, torch.nan, dtype=torch.float32)
    prefill.attend(step, prefill.choose(step, num_kept), output)
    for rows, expected in expected_rows(batch, softcap):
        assert relative_l1(output[rows], expected) <= 1e-5


@pytest.mark.skipif(INTERPRETED, reason="needs vLLM's own classes")
@pytest.mark.parametrize("with_query", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_layer_reads_vllms_bytes_with_its_scales_and_sinks(
    per_head: bool, with_query: bool
) -> None:
    from tests.layers import make_impl

    batch = make_batch([(50, 131), (20, 20)], 32, 16, 16, torch.bfloat16, "cpu", True)
    quantise(batch, FP8, with_query, per_head)
    assert batch.scales is not None
    # vLLM keeps K and V side by side, as bytes, and one scale for all heads as a scalar.
    cache = torch.cat([batch.key_cache.view(torch.uint8), batch.value_cache.view(torch.uint8)], -1)
    scales = batch.scales.unbind() if per_head else batch.scales[:, 0].unbind()
    # A query that vLLM did not quantise has a scale that must not be applied.
    of_query = scales[0] if with_query else torch.tensor(7.0)
    layer = SimpleNamespace(_q_scale=of_query, _k_scale=scales[1], _v_scale=scales[2])
    sinks: Any = torch.nn.Parameter(torch.zeros(6), requires_grad=False)
    impl = make_impl(
        "cuda", num_heads=6, num_kv_heads=2, head_size=16, kv_cache_dtype="fp8", sinks=sinks
    )
    sinks.copy_(draw_sinks(6, "cpu"))
    batch.sinks = sinks
    kv_cache = cache.transpose(1, 2)
    assert is_readable(impl, kv_cache, batch.query, 32)
    assert not is_readable(make_impl("cuda"), kv_cache, batch.query, 32)
    step = step_inputs(impl, layer, batch.query, kv_cache, batch.block_table, batch.blocks)
    keeps = [
        reference_select(
            problem.query, problem.key, batch.problems[0].thresholds, problem.geometry, SCALE
        )
        for problem in batch.problems
    ]
    longest = batch.blocks.max_k_blocks
    padded = [
        torch.nn.functional.pad(keep, (0, longest - keep.shape[-1]))
        for keep in batch.in_step_order(keeps)
    ]
    output = torch.full_like(batch.query, torch.nan, dtype=torch.float64)
    sparse_prefill(
        step, build_tile_lists(torch.cat(padded, dim=1)), output, SCALE,
        implementation="reference",
    )  # fmt: skip
    for rows, expected in expected_rows(batch, 0.0):
        assert relative_l1(output[rows], expected) <= 1e-6
