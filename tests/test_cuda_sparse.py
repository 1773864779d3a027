"""Both ways of sparse prefill on CUDA, selection included, against the fp64 reference."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import Batch, draw_sinks, make_batch, quantise
from tests.problems import SCALE, relative_l1
from tests.profiles import SMALL_MODEL, uniform_profile
from vllm_afbs import compat
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.kernels.reference import reference_attention, reference_select

LENGTHS = [(640, 640), (300, 1000), (128, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["TilePrefill", "TritonPrefill"])
@pytest.mark.parametrize("heads_outside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 128), (128, 128), (128, 64), (64, 96)])
def test_sparse_prefill_equals_the_reference(
    page_size: int, head_dim: int, dtype: torch.dtype, heads_outside: bool, way: str
) -> None:
    check(make_batch(LENGTHS, 128, page_size, head_dim, dtype, "cuda", heads_outside), way)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["TilePrefill", "TritonPrefill"])
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("shape", [(128, 64), (64, 128), (64, 64)], ids=str)
def test_every_shape_equals_the_reference(
    shape: tuple[int, int], head_dim: int, page_size: int, way: str
) -> None:
    block_q, block_k = shape
    batch = make_batch(
        LENGTHS, block_q, page_size, head_dim, torch.bfloat16, "cuda", block_k=block_k
    )
    check(batch, way)
    batch.sinks = draw_sinks(6, "cuda")
    check(batch, way, 5.0)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["TilePrefill", "TritonPrefill"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 128), (128, 64), (128, 256)])
def test_sinks_and_softcap_equal_the_reference(
    page_size: int, head_dim: int, softcap: float, way: str
) -> None:
    batch = make_batch(LENGTHS, 128, page_size, head_dim, torch.bfloat16, "cuda")
    check(batch, way, softcap)
    batch.sinks = draw_sinks(6, "cuda")
    check(batch, way, softcap)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["TilePrefill", "TritonPrefill"])
@pytest.mark.parametrize(("per_head", "softcap"), [(False, 0.0), (True, 0.0), (True, 5.0)])
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 128), (128, 128), (128, 64), (128, 256)])
def test_fp8_equals_the_reference(
    page_size: int, head_dim: int, per_head: bool, softcap: float, way: str
) -> None:
    batch = make_batch(LENGTHS, 128, page_size, head_dim, torch.bfloat16, "cuda")
    quantise(batch, torch.float8_e4m3fn, True, per_head)
    check(batch, way, softcap)
    batch.sinks = draw_sinks(6, "cuda")
    check(batch, way, softcap)


def check(batch: Batch, way: str, softcap: float = 0.0) -> None:
    """Runs a kernel with every block kept and with the chosen ones, against the reference."""
    from vllm_afbs.backends.cuda import sparse

    sinks = None if batch.sinks is None else batch.sinks.cpu()
    # The copy engine fetches whole pages; what lies behind a context is masked, not skipped.
    for name in ("key_cache", "value_cache"):
        cache = getattr(batch, name)
        setattr(batch, name, cache.float().nan_to_num(0.0).to(cache.dtype))
    thresholds = batch.problems[0].thresholds
    errors = []
    for chosen in (HeadThresholds(torch.ones(6), thresholds.theta), thresholds):
        on_device = HeadThresholds(chosen.tau.cuda(), chosen.theta.cuda())
        prefill = getattr(sparse, way)(sparse.Layer(on_device, SCALE, softcap))
        step = batch.step
        # As in a model: FlashAttention writes bf16 for FP8.
        dtype = torch.bfloat16 if batch.scales is not None else batch.query.dtype
        output = torch.full_like(batch.query, torch.nan, dtype=dtype)
        num_kept = torch.zeros(6, dtype=torch.int64, device="cuda")
        prefill.attend(step, prefill.choose(step, num_kept), output)
        worst, num_expected = 0.0, torch.zeros(6, dtype=torch.int64)
        for request in batch.blocks.requests:
            problem = batch.problems[request.table_row - 1]
            parts = (problem.query, problem.key, problem.value)
            keep = reference_select(*parts[:2], chosen, problem.geometry, SCALE)
            expected, _ = reference_attention(
                *parts, keep, problem.geometry, SCALE, softcap=softcap, sinks=sinks
            )
            worst = max(worst, relative_l1(output[request.rows].cpu(), expected))
            num_expected += keep.sum((1, 2))
        errors.append(worst)
        assert torch.equal(num_kept.cpu(), num_expected)
    dense_error, sparse_error = errors
    # FlashAttention also rounds the softmax's weights to FP8 where the query is in FP8.
    is_fp8 = batch.scales is not None and way == "TilePrefill"
    assert (
        dense_error
        <= (0.5 if is_fp8 else 8) * torch.finfo(batch.query.dtype if is_fp8 else dtype).eps
    )
    # Dropping blocks must not cost precision: the same operation in the same dtype is the budget.
    assert sparse_error <= 2 * dense_error


@settings(deadline=None)  # the first import of vLLM is in its time
@given(st.integers(1, 200_000), st.integers(0, 200_000), st.sampled_from([16, 64, 128]), st.data())
def test_every_context_shares_its_kernels_with_one_that_was_compiled(
    shortest: int, more: int, block_k: int, data: st.DataObject
) -> None:
    from vllm_afbs.backends.cuda.warmup import lengths_to_compile

    longest = shortest + more
    kv_len = data.draw(st.integers(shortest, longest))
    rows = [length // block_k for length in lengths_to_compile(shortest, longest, block_k)]
    assert triton.next_power_of_2(triton.cdiv(kv_len, block_k)) in rows
    assert len(rows) <= 2 + math.log2(longest / shortest)


def keep_arguments(
    builder: Any, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
) -> None:
    """What the base class of all builders does."""
    builder.kv_cache_spec, builder.layer_names = kv_cache_spec, layer_names
    builder.vllm_config, builder.device = vllm_config, device


def test_a_server_compiles_its_sparse_layers_for_the_contexts_that_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.layers import make_impl
    from vllm_afbs.backends.cuda import backend, graphs
    from vllm_afbs.serving.plan import plan_layer

    compiled = []
    monkeypatch.setattr(backend, "compile_kernels", lambda *arguments: compiled.append(arguments))
    monkeypatch.setattr(compat, "flash_attention", lambda: None)
    monkeypatch.setattr(graphs.FlashAttentionMetadataBuilder, "__init__", keep_arguments)
    profile = uniform_profile()
    monkeypatch.setattr(backend, "join_server", lambda _: profile)
    plans = [[plan_layer(profile, index, 4, 0, why)] for index, why in enumerate((None, "alibi"))]
    impls = [make_impl("cuda") for _ in plans]
    monkeypatch.setattr(backend, "plan_layers", lambda *_: zip(impls, plans, strict=True))
    monkeypatch.setattr(backend.summary, "report", lambda *_: None)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=4096),
        additional_config={},
        lora_config=None,
        speculative_config=None,
        observability_config=SimpleNamespace(),
    )
    spec, device = SimpleNamespace(block_size=64), torch.device("cpu")
    backend.AfbsCUDAMetadataBuilder(spec, ["a", "b"], config, device)
    ((prefills, shape, *lengths, where),) = compiled  # the other layer is dense
    assert len(prefills) == 2
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, SMALL_MODEL.head_dim)
    assert (shape.dtype, shape.page_size) == (torch.bfloat16, 64)
    assert (shape.block_q, shape.block_k) == (profile.block_q, profile.block_k)
    # Calibrated to 8192, which this server does not reach.
    assert lengths == [profile.min_seq_len, 4096]
    assert where == device


def test_without_a_profile_attention_is_flash_attentions_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.layers import make_impl
    from vllm_afbs.backends.cuda import backend, graphs
    from vllm_afbs.serving.plan import plan_layer

    monkeypatch.setattr(graphs.FlashAttentionMetadataBuilder, "__init__", keep_arguments)
    impl = make_impl("cuda")
    assert impl.forward.__func__ is backend.AfbsCUDAImpl.forward
    plans = [(impl, [plan_layer(None, 0, 4, 0, None)])]
    monkeypatch.setattr(backend, "plan_layers", lambda *_: iter(plans))
    monkeypatch.setattr(backend.summary, "report", lambda *_: None)
    config: Any = SimpleNamespace(
        additional_config={},
        lora_config=None,
        speculative_config=None,
        observability_config=SimpleNamespace(),
    )
    backend.AfbsCUDAMetadataBuilder(
        SimpleNamespace(block_size=64), ["a"], config, torch.device("cpu")
    )
    assert impl.forward.__func__ is backend.FlashAttentionImpl.forward


STEPS = [[(257, 1000)], [(640, 640), (129, 1537)], [(1024, 1024)], [(131, 385)]]
"""Chunks, batches and whole prompts whose numbers are multiples of 16 or not."""


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("has_theta", [False, True])
def test_a_warm_server_compiles_nothing_in_a_request(
    has_theta: bool, is_fp8: bool, block: int
) -> None:
    from vllm_afbs.backends.cuda import sparse
    from vllm_afbs.backends.cuda.warmup import LayerShape, compile_kernels

    compiled = []

    def note(*args: Any, **kwargs: Any) -> None:
        compiled.append(kwargs["fn"].name)

    batches = [
        make_batch(lengths, block, block, 112, torch.bfloat16, "cuda", True) for lengths in STEPS
    ]
    if is_fp8:  # and has sinks
        for batch in batches:
            quantise(batch, torch.float8_e4m3fn, True, True)
            batch.sinks = draw_sinks(6, "cuda")
    problem = batches[0].problems[0]
    num_heads = len(problem.thresholds.tau)
    thresholds = HeadThresholds(torch.full((num_heads,), 0.5), problem.thresholds.theta, has_theta)
    layer = sparse.Layer(thresholds.to(torch.device("cuda")), SCALE, 0.0)
    ways = [sparse.TilePrefill(layer), sparse.TritonPrefill(layer)]
    shape = LayerShape(
        num_heads=num_heads,
        num_kv_heads=problem.num_kv_heads,
        head_dim=112,
        dtype=torch.bfloat16,
        query_dtype=batches[0].query.dtype,
        cache_dtype=batches[0].key_cache.dtype,
        page_size=block,
        block_q=block,
        block_k=block,
        sinks_dtype=torch.bfloat16 if is_fp8 else None,
    )
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_post_compile_hook = note
        compile_kernels(ways, shape, 300, 2000, torch.device("cuda"))
        assert compiled  # of a head size that no other test has
        compiled.clear()
        for batch in batches:
            step = batch.step
            # A layer's row of the counters begins anywhere.
            num_kept = torch.zeros(num_heads + 1, dtype=torch.int64, device="cuda")[1:]
            for prefill in ways:
                chosen = prefill.choose(step, num_kept)
                output = torch.empty_like(step.query, dtype=torch.bfloat16)
                prefill.attend(step, chosen, output)
    assert compiled == []
