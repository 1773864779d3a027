"""Models whose images have masks of their own, on CUDA: which backend runs which step.

Made of vLLM's own composite, without a GPU: what its kernels compute is not run here.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadata
from vllm.v1.attention.selector import AttentionSelectorConfig

from tests import layers
from tests.profiles import uniform_profile
from vllm_afbs import compat
from vllm_afbs.backends.cuda.backend import AfbsCUDABackend, AfbsCUDAImpl
from vllm_afbs.serving import eligibility

pytest.importorskip("vllm.v1.attention.backends.composite", reason="this vLLM composes nothing")
images: Any = importlib.import_module("vllm_afbs.backends.cuda.images")


def import_platforms() -> tuple[Any, Any]:
    """VLLM's CUDA platform and ours; builds without CUDA lack the kernels that they load."""
    kernels = "vllm._C_stable_libtorch"
    is_missing = find_spec(kernels) is None
    if is_missing:
        sys.modules[kernels] = ModuleType(kernels)
    try:
        stock: Any = importlib.import_module("vllm.platforms.cuda")
        ours: Any = importlib.import_module("vllm_afbs.backends.cuda.platform")
    finally:
        if is_missing:
            del sys.modules[kernels]
    return stock.CudaPlatform, ours.AfbsCudaPlatform


CudaPlatform, AfbsCudaPlatform = import_platforms()
OURS = SimpleNamespace(name="AFBS", get_class=lambda: AfbsCUDABackend)
HOPPER = DeviceCapability(9, 0)


def choose(backend: Any, **asked: Any) -> str:
    """The class that our platform names for a layer of Gemma 3 on an H100."""
    config = AttentionSelectorConfig(
        **{"head_size": 256, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None}
        | asked
    )
    version = "vllm.v1.attention.backends.flash_attn.get_flash_attn_version"
    with (
        patch.object(AfbsCudaPlatform, "get_device_capability", Mock(return_value=HOPPER)),
        patch(version, Mock(return_value=3)),
    ):
        return AfbsCudaPlatform.get_attn_backend_cls(backend, config)


def test_layers_with_masks_for_images_get_the_composite() -> None:
    chosen = choose(OURS, use_mm_prefix=True)
    assert chosen == compat.CUDA_IMAGES_BACKEND_PATH
    kind: Any = resolve_obj_by_qualname(chosen)
    assert kind is images.AfbsImagesBackend
    assert kind.get_name() == compat.BACKEND_NAME
    assert choose(OURS) == compat.CUDA_BACKEND_PATH
    # What a layer has besides is still checked.
    with pytest.raises(ValueError, match=r"^--attention-backend afbs cannot run .*MLA not supp"):
        choose(OURS, use_mm_prefix=True, use_mla=True)


def test_another_backend_is_vllms_choice() -> None:
    with patch.object(CudaPlatform, "get_attn_backend_cls", Mock(return_value="its")) as stock:
        for backend in (None, SimpleNamespace(name="FLASH_ATTN")):
            assert choose(backend, use_mm_prefix=True) == "its"
    assert stock.call_count == 2


def test_pages_and_graphs_are_as_ours_allow() -> None:
    kind = images.AfbsImagesBackend
    version = "vllm.v1.attention.backends.flash_attn.get_flash_attn_version"
    with patch(version, Mock(return_value=3)):
        assert kind.get_supported_kernel_block_sizes() == [128, 64, 32, 16]
        assert kind.get_preferred_block_size(16) == 128
        assert kind.supports_block_size(784)
    assert kind.supports_mm_prefix()
    layer = SimpleNamespace(sliding_window=1024, mm_prefix_clamp_sliding_window=False)
    for layers_of, expected in (
        ({}, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"a": layer}, AttentionCGSupport.NEVER),
    ):
        config: Any = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=layers_of),
            additional_config={},
        )
        assert kind.get_builder_cls().get_cudagraph_support(config, Mock()) is expected


@pytest.fixture(autouse=True)
def composite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.IMPLS, "cuda images", images.AfbsImagesImpl)


@pytest.fixture
def layer() -> Any:
    """A layer around the composite's implementation, with both of its parts."""
    return layers.make_layer(layers.make_impl("cuda images"))


def test_layers_are_planned_by_our_part(layer: Any) -> None:
    general, ours = layer.impl.get_impl_variants()
    assert isinstance(general, TritonAttentionImpl)
    assert type(ours) is AfbsCUDAImpl
    assert compat.attention_impl(layer) is ours
    profile = uniform_profile()
    obstacles = eligibility.place_obstacles(layer, 0, profile, 1)
    assert eligibility.first_true(obstacles) is None
    assert not eligibility.is_local(layer, profile)
    assert ours.unsupported_feature(128, profile) is None
    # A plain layer is its own only part, and so is a layer of 0.26, which names no parts.
    plain = layers.make_impl("cuda")
    assert compat.attention_impl(layers.make_layer(plain)) is plain
    old = SimpleNamespace(impl=object())
    assert compat.attention_impl(old) is old.impl


def test_windows_are_found_in_our_part() -> None:
    impl = layers.make_impl("cuda images", sliding_window=128)
    assert eligibility.is_local(layers.make_layer(impl), uniform_profile())


def test_each_step_runs_where_its_metadata_came_from(layer: Any) -> None:
    general, ours = layer.impl.get_impl_variants()
    steps = {0: general, 1: ours}
    for variant, impl in steps.items():
        metadata = SimpleNamespace(_attention_backend_variant=variant)
        with patch.object(impl, "forward", Mock()) as forward:
            layer.impl.forward(layer, *[None] * 4, metadata, None)
        forward.assert_called_once()
    # vLLM measures memory with ours, which takes the more.
    with patch.object(ours, "forward", Mock()) as forward:
        layer.impl.forward(layer, *[None] * 4, None, None)
    forward.assert_called_once()


def step(spans: dict[int, list[tuple[int, int]]], q_len: int, kv_len: int) -> Any:
    """One request with images at these positions of its prompt."""
    common = Mock(spec=CommonAttentionMetadata)
    common.mm_req_doc_ranges = spans
    common.max_query_len = q_len
    common.query_start_loc_cpu = torch.tensor([0, q_len], dtype=torch.int32)
    common.seq_lens_cpu_upper_bound = torch.tensor([kv_len], dtype=torch.int32)
    return common


@pytest.mark.parametrize(
    ("spans", "q_len", "kv_len", "is_masked"),
    [
        ({}, 1024, 1024, False),
        ({0: [(100, 355)]}, 1024, 1024, True),
        ({0: [(100, 355)]}, 1024, 2048, False),  # the image is in an earlier chunk
        ({0: [(100, 355)]}, 1, 2048, False),  # a decode
    ],
)
def test_only_steps_that_compute_an_image_leave_ours(
    spans: dict[int, list[tuple[int, int]]], q_len: int, kv_len: int, is_masked: bool
) -> None:
    """And they are counted there, for each layer with full attention."""
    builder = object.__new__(images.AfbsImagesMetadataBuilder)
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    builder.routing = images._composites.MMPrefixAttentionRouting([], config)
    masked = object.__new__(TritonAttentionMetadata)
    causal = SimpleNamespace()
    builder.general_builder = Mock(build=Mock(return_value=masked))
    builder.causal_builder = Mock(build=Mock(return_value=causal))
    common = step(spans, q_len, kv_len)
    metadata = builder.build(0, common)
    assert metadata is (masked if is_masked else causal)
    assert metadata._attention_backend_variant == int(not is_masked)
    assert builder.causal_builder.count_masked_step.call_count == is_masked


def test_masked_steps_are_counted_as_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_afbs.backends import shared
    from vllm_afbs.backends.cuda import backend

    builder: Any = object.__new__(backend.AfbsCUDAMetadataBuilder)
    config: Any = SimpleNamespace(lora_config=None, speculative_config=None, additional_config={})
    builder._sorter = shared.StepSorter(config, uniform_profile())
    builder._plans = [[Mock(dense_reason=None)]] * 3
    counted = Mock()
    monkeypatch.setattr(backend.fallbacks, "count", counted)
    monkeypatch.setattr(shared.metrics, "count_tokens", Mock())
    common = step({0: [(0, 9)]}, 1024, 1024)
    builder.count_masked_step(common)
    counted.assert_called_once_with({"attention_mask": 3})
    builder.count_masked_step(step({}, 1, 1024))  # a decode
    builder._plans = []  # windows alone
    builder.count_masked_step(common)
    counted.assert_called_once()


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ({}, '{"is_mm_prefix_lm": false}'),
        (
            {"use_bidirectional_attention": "vision"},
            '{"text_config": {"use_bidirectional_attention": null}}',
        ),
    ],
)
def test_versions_without_composites_say_how_to_start_text_only(
    text: dict[str, Any], override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "vllm_afbs.backends.cuda.platform"
    monkeypatch.setattr(CudaPlatform, "check_and_update_config", Mock())
    monkeypatch.setattr(f"{module}.admission.admit_or_exit", lambda _: True)
    begun = Mock()
    monkeypatch.setattr(f"{module}.begin_server", begun)
    model = SimpleNamespace(
        model="gemma", is_mm_prefix_lm=True, hf_text_config=SimpleNamespace(**text)
    )
    config: Any = SimpleNamespace(model_config=model)
    AfbsCudaPlatform.check_and_update_config(config)
    begun.assert_called_once()
    monkeypatch.setattr(compat, "composites", lambda: None)
    with pytest.raises(SystemExit, match=r"^vllm-afbs: gemma: .* text-only with") as refused:
        AfbsCudaPlatform.check_and_update_config(config)
    line = str(refused.value)
    assert """--limit-mm-per-prompt '{"image": 0}'""" in line
    assert f"--hf-overrides '{override}'" in line
    assert "\n" not in line
    model.is_mm_prefix_lm = False
    AfbsCudaPlatform.check_and_update_config(config)
