"""Pages that vLLM splits blocks into, and layers of both backends that are left to vLLM."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.worker.utils import select_common_block_size

from tests.layers import make_impl
from tests.profiles import uniform_profile
from vllm_afbs import compat
from vllm_afbs.backends.cpu import backend as cpu
from vllm_afbs.backends.cuda import backend as cuda
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving.pages import split_page_sizes
from vllm_afbs.serving.plan import plan_layer


@pytest.mark.parametrize(
    ("block", "on_cpu", "on_cuda"),
    [(128, 128, 128), (256, 128, 128), (384, 128, 128), (672, 32, 32), (96, 32, 32),
     (528, None, 16), (784, None, 16), (64, 64, 64)],
)  # fmt: skip
def test_blocks_are_split_into_the_largest_pages(
    block: int, on_cpu: int | None, on_cuda: int
) -> None:
    assert select_common_block_size(block, [cuda.AfbsCUDABackend]) == on_cuda
    if on_cpu is not None:
        assert select_common_block_size(block, [cpu.AfbsCPUBackend]) == on_cpu
    assert cpu.AfbsCPUBackend.supports_block_size(block) == (on_cpu is not None)


@pytest.fixture
def serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes vLLM build for a server, as its workers do."""

    def serve(profile: Profile | None, driven: int | None = None, named: int | None = None) -> None:
        afbs: dict[str, object] = {} if driven is None else {"block_k": driven}
        if profile is not None:
            path = tmp_path / f"{profile.profile_id}.json"
            path.write_text(profile.to_json())
            afbs = {"profile": str(path), "profile_id": profile.profile_id}
        cache = SimpleNamespace(block_size=named, user_specified_block_size=named is not None)
        config = SimpleNamespace(cache_config=cache, additional_config={"afbs": afbs})
        monkeypatch.setattr(compat, "current_config", lambda: config)

    return serve


@pytest.mark.parametrize("is_driven", [False, True])
@pytest.mark.parametrize(
    ("block_k", "pages"),
    [(128, {128: 128, 384: 128, 672: 32}), (64, {64: 64, 128: 64, 384: 64, 672: 32}),
     (256, {256: 128}), (32, {128: 32}), (16, {128: 16})],
)  # fmt: skip
def test_pages_on_cpus_are_key_blocks_or_parts_of_them(
    block_k: int,
    pages: dict[int, int],
    is_driven: bool,
    serves: Callable[..., None],
) -> None:
    """Of the profile, or of the job in a driven engine, which has no profile at its start."""
    if is_driven:
        serves(None, driven=block_k)
    else:
        serves(uniform_profile(block_k=block_k))
    for block, page in pages.items():
        if page >= 32:  # vLLM's kernels on the CPU read no smaller ones
            assert select_common_block_size(block, [cpu.AfbsCPUBackend]) == page
    # Whatever the pages, the layers' own check agrees that they can be read.
    impl, profile = make_impl("cpu"), uniform_profile(block_k=block_k)
    readable = {page: impl.unsupported_feature(page, profile) for page in pages.values()}
    assert set(readable.values()) == {None}


@pytest.mark.parametrize("block_k", [16, 32, 64, 128, 256, None])
def test_pages_on_gpus_are_large_whatever_the_key_blocks(
    block_k: int | None, serves: Callable[..., None]
) -> None:
    """Tiles name parts of pages, and FlashAttention reads large ones faster."""
    serves(None if block_k is None else uniform_profile(block_k=block_k))
    assert cuda.AfbsCUDABackend.get_preferred_block_size(16) == 128
    for block, page in {64: 64, 128: 128, 384: 128, 672: 32}.items():
        assert select_common_block_size(block, [cuda.AfbsCUDABackend]) == page
        if block_k is not None:
            profile = uniform_profile(block_k=block_k)
            assert make_impl("cuda").unsupported_feature(page, profile) != "page_size"


def test_no_page_is_better_than_another_where_none_fits(serves: Callable[..., None]) -> None:
    serves(uniform_profile(block_k=48))
    assert select_common_block_size(128, [cpu.AfbsCPUBackend]) == 128


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(cpu.AfbsCPUBackend, CPUAttentionBackend), (cuda.AfbsCUDABackend, FlashAttentionBackend)],
)
def test_blocks_that_stock_refuses_are_refused_and_no_others(ours: Any, stock: Any) -> None:
    for block in range(8, 800, 8):
        assert ours.supports_block_size(block) == stock.supports_block_size(block), block


def test_exact_sizes_of_vllms_own_backend_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_page_sizes([64]) == split_page_sizes([64], 32) == [64]
    assert split_page_sizes([MultipleOf(64)]) == [128, 64]
    # Up to 0.31 vLLM asks without a specification, and its backends take none.
    own = classmethod(lambda cls: [MultipleOf(32)])
    monkeypatch.setattr(FlashAttentionBackend, "get_supported_kernel_block_sizes", own)
    assert cuda.AfbsCUDABackend.get_supported_kernel_block_sizes() == [128, 64, 32]


def test_connectors_cannot_pack_the_layers_of_a_block() -> None:
    pytest.importorskip("vllm.v1.kv_cache_layout", reason="vLLM 0.26 has one layout of layers")
    layouts = cuda.AfbsCUDABackend.supported_kv_cache_layouts()
    assert layouts is not None
    assert layouts[0].name == "LBNHC"  # as without us
    assert not any(layout.is_block_outermost for layout in layouts)
    # Models whose layers have other heads need these.
    assert all(layout.is_block_compact for layout in layouts)
    stock = CPUAttentionBackend.supported_kv_cache_layouts()
    assert cpu.AfbsCPUBackend.supported_kv_cache_layouts() == stock


@pytest.mark.parametrize(
    ("backend", "by_kind", "expected"),
    [("AFBS", {}, True), (None, {}, False), ("CPU_ATTN", {"full_attention": "AFBS"}, True),
     (None, {"sliding_window": "CPU_ATTN"}, False)],
)  # fmt: skip
def test_the_backend_may_be_chosen_for_a_kind_of_layers(
    backend: str | None, by_kind: dict[str, str], expected: bool
) -> None:
    def member(name: str | None) -> Any:
        return None if name is None else SimpleNamespace(name=name)

    config: Any = SimpleNamespace(
        attention_config=SimpleNamespace(
            backend=member(backend),
            backend_per_kind={kind: member(name) for kind, name in by_kind.items()},
        )
    )
    assert compat.chooses_afbs(config) == expected


@pytest.mark.parametrize(
    ("platform", "parent"), [("cpu", CPUAttentionBackendImpl), ("cuda", FlashAttentionImpl)]
)
def test_a_layer_that_steps_aside_is_vllms_until_it_serves_again(
    platform: str, parent: Any
) -> None:
    impl = make_impl(platform, sliding_window=64)
    assert impl.window == 64
    impl.step_aside()
    assert impl.forward.__func__ is parent.forward
    impl.serve(Mock())
    assert impl.forward.__func__ is type(impl).forward


BUILDERS = [
    (cpu.AfbsCPUMetadataBuilder, CPUAttentionMetadataBuilder, cpu),
    (cuda.AfbsCUDAMetadataBuilder, FlashAttentionMetadataBuilder, cuda),
]


@pytest.mark.parametrize(("kind", "parent", "module"), BUILDERS)
@pytest.mark.parametrize("local", [True, False])
def test_a_builder_of_windows_alone_builds_what_vllm_builds(
    kind: Any, parent: Any, module: Any, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = object()
    monkeypatch.setattr(parent, "build", lambda *_: built)
    impls = [Mock(), Mock()]
    reasons: list[Any] = ["local_attention", "local_attention" if local else "profile_dense"]
    plans = [[plan_layer(uniform_profile(), 0, 4, 0, reason)] for reason in reasons]
    monkeypatch.setattr(module, "plan_layers", lambda *_: list(zip(impls, plans, strict=True)))
    monkeypatch.setattr(module.summary, "report", Mock())
    if module is cuda:
        monkeypatch.setattr(cuda, "DeviceMeter", Mock())
        monkeypatch.setattr(cuda, "read_settings", Mock())
    builder = kind.__new__(kind)
    builder.layer_names, builder._sorter = ["a", "b"], Mock()
    builder.vllm_config, builder.device = Mock(), "cpu"
    builder.kv_cache_spec = builder._cache_format = builder._meter = Mock()
    builder.block_size = 128
    for impl in impls:
        impl.sparse_prefills.return_value = {}
    builder.serve(uniform_profile())

    aside = [bool(impl.step_aside.called) for impl in impls]
    assert aside == [True, local]
    if local:
        assert builder.build(0, Mock()) is built
        builder._sorter.sort.assert_not_called()
    # vLLM may reuse the metadata of another such group, where its own backend allows it.
    expected = parent.supports_update_block_table and (local or module is cpu)
    assert builder.supports_update_block_table == expected
