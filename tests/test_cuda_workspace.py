"""Memory that sparse prefill takes on CUDA, and that vLLM measures before it sizes the cache."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.layers import make_impl
from tests.profiles import SMALL_MODEL, uniform_profile
from vllm_afbs import compat
from vllm_afbs.backends.cuda import backend, sparse
from vllm_afbs.backends.cuda.warmup import LayerShape
from vllm_afbs.backends.cuda.workspace import LargestStep, largest_step, workspace_bytes
from vllm_afbs.kernels import (
    BlockGeometry,
    HeadThresholds,
    PrefillRequest,
    StepInputs,
    cut_query_blocks,
)
from vllm_afbs.kernels.impl import (
    triton_packing,
    triton_prefill,
    triton_scoring,
    triton_selection,
)
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission

SHAPE = LayerShape(
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    query_dtype=torch.bfloat16,
    cache_dtype=torch.bfloat16,
    page_size=128,
    block_q=128,
    block_k=128,
)
FP8 = {"query_dtype": torch.float8_e4m3fn, "cache_dtype": torch.float8_e4m3fn}
MIB = 2**20


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that exist at once, as a device's allocator does."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        result = func(*args, **kwargs or {})
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                storage = each.untyped_storage()
                if storage._cdata not in before:  # not a view of what was there
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._alive.values()))
        return result


class NoKernel:
    """A kernel that is not launched."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves kernels out; what is allocated around them stays."""
    for module, names in (
        (triton_packing, ("_pool_block", "_unpack_block")),
        (triton_scoring, ("_score_key_blocks", "_key_block_self_similarity")),
        (triton_selection, ("_select_tile",)),
        (triton_prefill, ("_prefill_tile",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, NoKernel())

    def flash_attention(
        query: torch.Tensor, *_: Any, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # What the kernel allocates itself: log-sum-exps, and a schedule of the sequences.
        lse = torch.empty(1, len(query))
        torch.empty(4 * len(arguments["seqused_k"]), dtype=torch.int32)
        return arguments["out"], lse

    monkeypatch.setattr(compat, "flash_attention", lambda: flash_attention)


def make_step(q_lens: list[int], kv_len: int, shape: LayerShape, device: str) -> StepInputs:
    """A step of long prefills with contexts of one length, all of whose pages are one."""
    requests, rows = [], 0
    for index, q_len in enumerate(q_lens):
        geometry = BlockGeometry(q_len, kv_len, shape.block_q, shape.block_k)
        requests.append(PrefillRequest(rows, index, geometry))
        rows += q_len
    blocks = cut_query_blocks(requests, torch.device(device))
    query = torch.zeros(
        rows, shape.num_heads, shape.head_dim, dtype=shape.query_dtype, device=device
    )
    size = (1, shape.num_kv_heads, shape.page_size, 2 * shape.head_dim)
    page = torch.zeros(size, dtype=shape.cache_dtype, device=device)
    scales = (
        torch.ones(3, shape.num_kv_heads, device=device)
        if shape.cache_dtype.itemsize == 1
        else None
    )
    caches = page.transpose(1, 2).split(shape.head_dim, dim=-1)
    num_pages = -(-kv_len // shape.page_size)
    table = torch.zeros(len(q_lens), num_pages, dtype=torch.int32, device=device)
    return StepInputs(query, *caches, table, blocks, scales=scales)


def layer_of(shape: LayerShape, device: str) -> sparse.Layer:
    tau = torch.full((shape.num_heads,), 0.9, device=device)
    chosen = HeadThresholds(tau, torch.full_like(tau, 0.2), has_theta=True)
    return sparse.Layer(chosen, shape.head_dim**-0.5, 0.0)


KV_LEN, NUM_TOKENS = 32768, 4096
# A block begins at every multiple of 128, so a chunk of 129 rows that ends at 32,767 has three.
STEPS = {
    "one prompt": ([NUM_TOKENS], KV_LEN),
    "one prompt, cut between blocks": ([NUM_TOKENS], KV_LEN - 1),
    "two prompts": ([2100, 1996], KV_LEN - 1),
    "many prompts": ([129] * (NUM_TOKENS // 129), KV_LEN - 1),
    "prompts of one block": ([128] * (NUM_TOKENS // 128), KV_LEN - 1),
    "a short context": ([NUM_TOKENS], 8192),
}


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("dtypes", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["TilePrefill", "TritonPrefill"])
def test_no_step_needs_more_than_was_shown(
    kind: str, dtypes: dict[str, torch.dtype], page_size: int, name: str
) -> None:
    shape = replace(SHAPE, page_size=page_size, **dtypes)
    q_lens, kv_len = STEPS[name]
    step = make_step(q_lens, kv_len, shape, "cpu")
    prefill = getattr(sparse, kind)(layer_of(shape, "cpu"))
    num_kept = torch.zeros(shape.num_heads, dtype=torch.int64)
    output = torch.empty_like(step.query, dtype=shape.dtype)
    with Allocations() as counted:
        prefill.attend(step, prefill.choose(step, num_kept), output)
    shown = workspace_bytes(shape, LargestStep(NUM_TOKENS, len(q_lens), KV_LEN))
    assert 0 < counted.peak <= shown
    if kind == "TilePrefill" and name.startswith("one prompt"):
        assert counted.peak > 0.9 * shown


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("kv_len", [1024, 32768])
@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("kind", ["TilePrefill", "TritonPrefill"])
def test_no_shape_of_blocks_needs_more_than_was_shown(
    kind: str, blocks: tuple[int, int], kv_len: int
) -> None:
    shape = replace(SHAPE, page_size=64, block_q=blocks[0], block_k=blocks[1])
    for q_lens in ([1000], [500, 500], [65] * 15):
        step = make_step(q_lens, kv_len - 1, shape, "cpu")
        prefill = getattr(sparse, kind)(layer_of(shape, "cpu"))
        num_kept = torch.zeros(shape.num_heads, dtype=torch.int64)
        output = torch.empty_like(step.query, dtype=shape.dtype)
        with Allocations() as counted:
            prefill.attend(step, prefill.choose(step, num_kept), output)
        shown = workspace_bytes(shape, LargestStep(1000, len(q_lens), kv_len))
        assert 0 < counted.peak <= shown


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [{}, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("q_lens", [[8192], [131072], [4000, 4192], [129] * 60], ids=len)
def test_a_gpu_takes_what_was_shown(q_lens: list[int], dtypes: dict[str, torch.dtype]) -> None:
    shape = replace(SHAPE, num_heads=32, num_kv_heads=8, head_dim=128, **dtypes)
    kv_len = 131072
    step = make_step(q_lens, kv_len, shape, "cuda")
    prefill = sparse.TilePrefill(layer_of(shape, "cuda"))
    num_kept = torch.zeros(shape.num_heads, dtype=torch.int64, device="cuda")
    output = torch.empty_like(step.query, dtype=shape.dtype)
    prefill.attend(step, prefill.choose(step, num_kept), output)  # compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefill.attend(step, prefill.choose(step, num_kept), output)
    taken = torch.cuda.max_memory_allocated() - before
    shown = workspace_bytes(shape, LargestStep(sum(q_lens), len(q_lens), kv_len))
    # The allocator rounds large blocks up by 1 MiB or less.
    assert 0.8 * shown < taken <= shown + 16 * MIB


def make_config(profile: Profile | None, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A server's configuration."""
    monkeypatch.setattr(admission, "admitted_profile", lambda _: profile)
    values: dict[str, Any] = {
        "additional_config": {},
        "cache_config": SimpleNamespace(block_size=64),
        "lora_config": None,
        "model_config": SimpleNamespace(
            dtype=torch.bfloat16, max_model_len=131072, enable_sleep_mode=False
        ),
        "scheduler_config": SimpleNamespace(max_num_batched_tokens=8192, max_num_seqs=256),
    }
    return SimpleNamespace(**values | changes)


def shown_bytes(impl: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a layer allocates while vLLM measures memory."""
    stock = Mock(side_effect=lambda *args: args[7])
    monkeypatch.setattr(backend.FlashAttentionImpl, "forward", lambda *args: stock(*args))
    rows = torch.zeros(8192, 4, SMALL_MODEL.head_dim)
    with Allocations() as counted:
        assert impl.forward(None, rows, rows, rows, rows, None, rows) is rows
    assert stock.call_count == 1
    return counted.peak


def test_a_layer_shows_its_workspace_while_vllm_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = uniform_profile()  # up to 8192
    impl = make_impl("cuda")
    impl._vllm_config = make_config(profile, monkeypatch)
    shape = LayerShape.of(impl, profile, impl._vllm_config.model_config, 64)
    expected = workspace_bytes(shape, LargestStep(8192, 256, 8192))
    packed = 8192 * 4 * SMALL_MODEL.head_dim * 2
    assert expected > 2 * packed
    assert shown_bytes(impl, monkeypatch) == expected
    lora = {"lora_config": object(), "additional_config": {"afbs": {"lora": "base"}}}
    impl._vllm_config = make_config(profile, monkeypatch, **lora)
    assert shown_bytes(impl, monkeypatch) == expected
    # Once the layer knows what it serves, the KV cache has its memory: vLLM only warms up.
    impl.serve(backend.ServedLayer(Mock(), 0, {}))
    assert shown_bytes(impl, monkeypatch) == 0


def test_layers_that_cannot_run_sparse_take_no_memory_from_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = SimpleNamespace(dtype=torch.bfloat16, max_model_len=1000, enable_sleep_mode=False)
    for profile, changes, arguments in (
        (None, {}, {}),
        (uniform_profile(tau=1.0), {}, {}),
        (uniform_profile(), {"lora_config": object()}, {}),
        (uniform_profile(), {"model_config": short}, {}),  # shorter than any sparse context
        (uniform_profile(), {}, {"alibi_slopes": [1.0] * 4}),
        (uniform_profile(), {}, {"sliding_window": 100}),
    ):
        impl = make_impl("cuda", **arguments)
        impl._vllm_config = make_config(profile, monkeypatch, **changes)
        assert shown_bytes(impl, monkeypatch) == 0, (changes, arguments)
    impl = make_impl("cuda")
    impl._vllm_config = None  # a layer outside of a server
    assert shown_bytes(impl, monkeypatch) == 0


def test_contexts_are_bounded_by_the_profile_and_by_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(None, monkeypatch)
    assert largest_step(config, uniform_profile()) == LargestStep(8192, 256, 8192)
    config.model_config.max_model_len = 3000
    assert largest_step(config, uniform_profile()) == LargestStep(8192, 256, 3000)
