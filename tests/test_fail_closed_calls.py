"""Calls of a layer with something that we do not know run dense, with their reason."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from tests.layers import make_impl
from tests.profiles import SMALL_MODEL, uniform_profile
from tests.test_fail_closed_steps import CPU_FIELDS, CUDA_FIELDS, one_prefill
from vllm_afbs.backends.cpu import sparse as cpu_sparse
from vllm_afbs.backends.cpu.backend import AfbsCPUMetadata
from vllm_afbs.backends.cpu.key_pages import UnknownPackingError
from vllm_afbs.backends.cuda import backend as cuda
from vllm_afbs.kernels import cut_query_blocks
from vllm_afbs.observability import fallbacks, metric_files
from vllm_afbs.serving.plan import LayerPlan, plan_layer

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, SMALL_MODEL.num_kv_heads, SMALL_MODEL.head_dim
PAGE_SIZE, NUM_PAGES, Q_LEN, KV_LEN = 128, 30, 2000, 3000
PLATFORMS = ("cpu", "cuda")
PLAN = plan_layer(uniform_profile(), 1, NUM_HEADS, 0, None)


class Dense:
    """VLLM's dense attention, made up; it takes one keyword more than today's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []

        def forward(
            impl: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any,
            output: torch.Tensor, output_scale: Any = None, output_block_scale: Any = None,
            **more: Any,
        ) -> torch.Tensor:  # fmt: skip
            self.calls.append(more)
            return output.fill_(1.0)

        for parent in (CPUAttentionBackendImpl, FlashAttentionImpl):
            monkeypatch.setattr(parent, "forward", forward)


class Sparse:
    """Sparse prefill of a layer on CUDA, made up."""

    def choose(self, step: Any, num_kept: torch.Tensor) -> None:
        assert step.key_cache.shape[2:] == (NUM_KV_HEADS, HEAD_DIM)

    def attend(self, step: Any, chosen: None, output: torch.Tensor) -> None:
        output.fill_(0.5)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    counter: Counter[str] = Counter()
    monkeypatch.setattr(fallbacks, "count", counter.update)
    monkeypatch.setattr(cuda, "fastest_kernel", lambda *_: "tiles")
    monkeypatch.setattr(cuda, "mark", lambda: None)
    return counter


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Dense:
    return Dense(monkeypatch)


def cache_of(order: str, num_layers: int = 3, padding: int = 0) -> torch.Tensor:
    """A layer's cache as vLLM passes it, its dimensions in memory in this order.

    Args:
        order: vLLM's letters: layers, blocks (pages), heads, N tokens, C for K and V of a token.
        num_layers: Layers of the model.
        padding: Elements behind each page, only for orders that end in ``BHNC`` or ``BNHC``.
    """
    sizes = {"L": num_layers, "B": NUM_PAGES, "H": NUM_KV_HEADS, "N": PAGE_SIZE, "C": 2 * HEAD_DIM}
    strides, stride = {}, 1
    for letter in reversed(order):
        stride += padding if letter == "B" else 0
        strides[letter] = stride
        stride *= sizes[letter]
    memory = torch.zeros(stride + padding * NUM_PAGES)
    return memory.as_strided([sizes[x] for x in "BHNC"], [strides[x] for x in "BHNC"])


def run(platform: str, kv_cache: torch.Tensor, plan: LayerPlan = PLAN, **more: Any) -> torch.Tensor:
    """Runs a step with one long prefill in a layer."""
    impl, step = make_impl(platform), one_prefill(Q_LEN, KV_LEN)
    query = torch.zeros(Q_LEN, NUM_HEADS, HEAD_DIM)
    table = torch.arange(NUM_PAGES, dtype=torch.int32)[None]
    meter: Any = SimpleNamespace(
        add=lambda work: None, counter=lambda slot: None, is_sampled=lambda: False
    )
    if platform == "cpu":
        reader = cpu_sparse.CacheFormat("vec", PAGE_SIZE, torch.float32)
        impl.serve(impl.prepare(plan, reader, meter))
        metadata: Any = AfbsCPUMetadata(**CPU_FIELDS | {"block_table": table}, step=step)
    else:
        is_sparse = plan.thresholds is not None
        impl.serve(cuda.ServedLayer(plan, 0, {"tiles": Sparse()} if is_sparse else {}))
        metadata = cuda.AfbsCUDAMetadata(
            **CUDA_FIELDS | {"block_table": table},
            blocks=cut_query_blocks(step.long_prefills, torch.device("cpu")),
            meter=meter,
            level=0,
        )
    output = torch.zeros_like(query)
    returned: torch.Tensor = impl.forward(
        None, query, query, query, kv_cache, metadata, output, **more
    )
    assert returned is output
    return output


@pytest.fixture(autouse=True)
def tiles_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves selection and kernels out; what decides whether they run stays."""

    def keep_diagonal(
        self: Any, query: torch.Tensor, kv_cache: Any, request: Any, pages: Any
    ) -> torch.Tensor:
        geometry = request.geometry
        kept = torch.zeros(NUM_HEADS, geometry.num_q_blocks, geometry.num_k_blocks)
        return kept.bool()

    def attend(self: Any, query: Any, output: torch.Tensor, *_: Any) -> None:
        output.fill_(0.5)

    monkeypatch.setattr(cpu_sparse, "key_page_reader", lambda *_: None)
    monkeypatch.setattr(cpu_sparse.SparsePrefill, "select", keep_diagonal)
    monkeypatch.setattr(cpu_sparse.SparsePrefill, "tables", lambda *_: "tables")
    monkeypatch.setattr(cpu_sparse.SparsePrefill, "attend", attend)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_keyword_of_tomorrow_is_left_to_vllms_dense_backend(
    platform: str, dense: Dense, counted: Counter[str]
) -> None:
    cache = cache_of("LBHNC", 1)
    assert (run(platform, cache) == 0.5).all()
    assert not counted
    assert (run(platform, cache, q_descale=SMALL_MODEL) == 1.0).all()
    assert dense.calls == [{"q_descale": SMALL_MODEL}]
    assert counted == {"unknown_argument": 1}


@pytest.mark.usefixtures("counted")
def test_a_dense_layers_reason_is_counted_once(dense: Dense, counted: Counter[str]) -> None:
    """On CUDA the builder counts it."""
    plan = plan_layer(uniform_profile(), 1, NUM_HEADS, 0, "alibi")
    for platform in PLATFORMS:
        run(platform, cache_of("LHBNC"), plan, q_descale=None)
    assert dense.calls == [{"q_descale": None}] * 2
    assert counted == {"alibi": 1}


def test_a_keyword_of_tomorrow_passes_steps_without_prefills(dense: Dense) -> None:
    for platform in PLATFORMS:
        rows = torch.zeros(1, NUM_HEADS, HEAD_DIM)
        make_impl(platform).forward(None, rows, rows, rows, rows, None, rows, q_descale=1)
    assert dense.calls == [{"q_descale": 1}] * 2


LAYOUTS = [
    ("LBNHC", 0, True),
    ("LBHNC", 0, True),
    ("BLNHC", 0, True),
    ("BLHNC", 0, True),
    ("BHLNC", 0, True),
    ("LHBNC", 0, False),  # a head's pages are nearer to each other than heads are
    ("LBNHC", 2 * HEAD_DIM, True),  # pages are padded by whole heads
    ("LBHNC", PAGE_SIZE * 2 * HEAD_DIM, True),
    ("LBNHC", 16, False),
    ("LBHNC", 16, False),
]


@pytest.mark.parametrize(("order", "padding", "readable"), LAYOUTS)
def test_a_layout_that_the_kernels_on_cuda_cannot_read_is_dense(
    order: str, padding: int, readable: bool, dense: Dense, counted: Counter[str]
) -> None:
    output = run("cuda", cache_of(order, padding=padding))
    assert (output == (0.5 if readable else 1.0)).all()
    assert len(dense.calls) == (not readable)
    assert counted == ({} if readable else {"cache_layout": 1})


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    "cache",
    [
        cache_of("LBHNC", 1).transpose(1, 2),
        cache_of("LBHNC", 1).half(),
        cache_of("LBHNC", 1)[..., :HEAD_DIM],
        cache_of("LBHNC", 1)[..., None],
        cache_of("LBHNC", 1).unflatten(-1, (2, -1)).movedim(3, 0),  # up to 0.24: K and V apart
        torch.zeros(NUM_PAGES, NUM_KV_HEADS + 1, PAGE_SIZE, 2 * HEAD_DIM),
        torch.zeros(NUM_PAGES, NUM_KV_HEADS, 96, 2 * HEAD_DIM),
        torch.zeros(0),
    ],
    ids=lambda cache: f"{list(cache.shape)} {cache.dtype}",
)
def test_another_shape_than_todays_is_dense(
    platform: str, cache: torch.Tensor, dense: Dense, counted: Counter[str]
) -> None:
    assert (run(platform, cache) == 1.0).all()
    assert len(dense.calls) == 1
    assert counted == {"cache_layout": 1}


def test_only_cpu_attns_layout_runs_sparse_on_the_cpu(dense: Dense, counted: Counter[str]) -> None:
    assert (run("cpu", cache_of("LBHNC")) == 0.5).all()
    for order in ("LBNHC", "BLHNC"):
        assert (run("cpu", cache_of(order)) == 1.0).all()
    assert counted == {"cache_layout": 2}


def test_page_numbers_have_to_fit_into_a_block_table(counted: Counter[str]) -> None:
    query, impl = torch.zeros(1, NUM_HEADS, HEAD_DIM), make_impl("cuda")
    token = 2 * HEAD_DIM
    for num_pages, readable in ((2**31 // 512, True), (2**31 // 512 + 1, False)):
        # Token by token, the view has a page for each token's head of four layers' cache.
        stride = (512 * token, token, NUM_KV_HEADS * token, 1)
        cache = torch.empty_strided((num_pages, NUM_KV_HEADS, 64, token), stride, device="meta")
        assert cuda.is_readable(impl, cache, query, 128) == readable, num_pages


def test_kernels_that_pack_keys_in_an_unknown_way_make_their_layer_dense_at_start(
    monkeypatch: pytest.MonkeyPatch, dense: Dense, counted: Counter[str], logged: list[str]
) -> None:
    def fail(*_: Any) -> None:
        raise UnknownPackingError("the 'vec' kernels' K cache is not a permutation of a page")

    monkeypatch.setattr(cpu_sparse, "key_page_reader", fail)
    assert (run("cpu", cache_of("LBHNC", 1)) == 1.0).all()
    assert counted == {"cache_layout": 1}
    (line,) = logged
    assert line.startswith("Layer 1 cannot read its cache: the 'vec' kernels'")


def test_what_only_a_call_shows_is_logged_at_the_first_prefill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    fallbacks._log_first.cache_clear()
    for _ in range(2):
        fallbacks.count({"cache_layout": 1, "unknown_argument": 2})
    assert ["cache_layout" in logged[0], "unknown_argument" in logged[1]] == [True, True]
    assert len(logged) == 2
    counts = {s.labels["reason"]: s.value for family in metric_files.read() for s in family.samples}
    assert counts == {"cache_layout": 2, "unknown_argument": 4}
