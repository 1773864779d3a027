"""Which steps vLLM captures into CUDA graphs, asked of vLLM's own configuration."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode
from vllm.config.compilation import CompilationConfig, CompilationMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend

from tests.profiles import uniform_profile
from vllm_afbs.backends.cuda.backend import AfbsCUDAMetadataBuilder
from vllm_afbs.files import write_atomically

SPEC: Any = None  # no builder of FlashAttention looks at it
NUM_DRAFTS = 3


@pytest.fixture
def with_profile(tmp_path: Path) -> Any:
    """A worker's configuration with an admitted profile."""
    profile = uniform_profile()
    path = tmp_path / "profile.json"
    write_atomically(path, profile.to_json())
    settings = {"profile": str(path), "profile_id": profile.profile_id}
    drafts = SimpleNamespace(num_speculative_tokens=NUM_DRAFTS)
    return SimpleNamespace(additional_config={"afbs": settings}, speculative_config=drafts)


WITHOUT_PROFILE: Any = SimpleNamespace(additional_config={}, speculative_config=None)


@pytest.mark.parametrize("stock", list(AttentionCGSupport))
def test_a_profile_never_raises_what_may_be_captured(
    stock: AttentionCGSupport, with_profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", stock)
    ours = AfbsCUDAMetadataBuilder.get_cudagraph_support
    assert ours(WITHOUT_PROFILE, SPEC) is stock
    lowered = {AttentionCGSupport.ALWAYS: AttentionCGSupport.UNIFORM_BATCH}.get(stock, stock)
    assert ours(with_profile, SPEC) is lowered


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE])
def test_a_full_graph_holds_decodes_but_no_prefill(
    mode: CUDAGraphMode, compiled: bool, with_profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock FlashAttention 3 captures both with FULL, and would replay a prefill dense."""
    support = AttentionCGSupport.ALWAYS
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", support)

    def resolved(vllm_config: Any) -> CUDAGraphMode:
        config = CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE if compiled else CompilationMode.NONE,
            cudagraph_mode=mode,
            cudagraph_capture_sizes=[1, 2, 4],
        )
        config.splitting_ops = list(config._attention_ops) if compiled else []
        return config.resolve_cudagraph_mode_and_sizes(
            AfbsCUDAMetadataBuilder.get_cudagraph_support(vllm_config, SPEC),
            "AfbsCUDABackend",
            uniform_decode_query_len=1 + NUM_DRAFTS,
            use_v2_model_runner=True,
        )

    assert resolved(WITHOUT_PROFILE) is mode
    with_ours = resolved(with_profile)
    assert with_ours.decode_mode() is CUDAGraphMode.FULL
    assert with_ours.mixed_mode() is not CUDAGraphMode.FULL
    if compiled:
        assert with_ours.mixed_mode() is CUDAGraphMode.PIECEWISE


def test_verified_drafts_of_different_lengths_still_replay_graphs(
    with_profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VLLM refuses to start with adaptive verification on a backend that does not say so."""
    support = AttentionCGSupport.ALWAYS
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", support)
    group: Any = SimpleNamespace(
        layer_names=["a"],
        kv_cache_spec=SPEC,
        backend=AfbsCUDAMetadataBuilder,
        get_metadata_builder=lambda _: AfbsCUDAMetadataBuilder,
    )
    refused = get_varlen_cudagraph_unsupported_backend
    assert refused([[group]], with_profile, 1 + NUM_DRAFTS) is None
    assert refused([[group]], with_profile, 2 + NUM_DRAFTS) is not None
    # FlashAttention 2's kernels cannot, with or without a profile.
    lower = AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "_cudagraph_support", lower)
    assert refused([[group]], with_profile, 1 + NUM_DRAFTS) is not None
