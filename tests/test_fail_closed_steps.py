"""Steps and requests that are not what was calibrated run dense, with their reason."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

from tests.layers import make_impl
from tests.profiles import uniform_profile
from vllm_afbs import compat
from vllm_afbs.backends.cpu.backend import AfbsCPUMetadata
from vllm_afbs.backends.cuda.backend import AfbsCUDAMetadata, AfbsCUDAMetadataBuilder
from vllm_afbs.observability import fallbacks, metric_files
from vllm_afbs.serving import configuration
from vllm_afbs.serving.batch import Step, sort_requests
from vllm_afbs.serving.reasons import Reason

CPU_FIELDS: dict[str, Any] = dict.fromkeys(
    ("num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens",
     "block_table", "slot_mapping", "scheduler_metadata"), 4
)  # fmt: skip
CUDA_FIELDS = {name: value for name, value in CPU_FIELDS.items() if name != "scheduler_metadata"}
SOME = torch.ones(2)
MASKS: list[tuple[type[Any], dict[str, Any], bool]] = [
    (CPUAttentionMetadata, CPU_FIELDS, True),
    (CPUAttentionMetadata, CPU_FIELDS | {"causal": False}, False),
    (CPUAttentionMetadata, CPU_FIELDS | {"dynamic_causal": SOME}, False),
    (CPUAttentionMetadata, CPU_FIELDS | {"encoder_cache": SOME}, False),
    (CPUAttentionMetadata, CPU_FIELDS | {"use_sdpa_prefill": True}, False),
    (CPUAttentionMetadata, CPU_FIELDS | {"sdpa_attn_masks": [None]}, False),
    (AfbsCPUMetadata, CPU_FIELDS | {"causal": False, "step": Step()}, False),
    (FlashAttentionMetadata, CUDA_FIELDS, True),
    (FlashAttentionMetadata, CUDA_FIELDS | {"max_num_splits": 32}, True),
    (FlashAttentionMetadata, CUDA_FIELDS | {"scheduler_metadata": SOME}, True),
    (FlashAttentionMetadata, CUDA_FIELDS | {"causal": False}, False),
    (FlashAttentionMetadata, CUDA_FIELDS | {"causal": SOME}, False),
    (FlashAttentionMetadata, CUDA_FIELDS | {"mm_prefix_query_range_tensor": SOME}, False),
    (FlashAttentionMetadata, CUDA_FIELDS | {"rswa_prefix_lens": SOME}, False),
    (FlashAttentionMetadata, CUDA_FIELDS | {"rswa_window": 128}, False),
    (FlashAttentionMetadata, CUDA_FIELDS | {"dcp_context_kv_lens": SOME}, False),
]


@dataclass
class Metadata026(FlashAttentionMetadata):
    """The fields that vLLM 0.26.0 has and 0.32.0 has not."""

    use_cascade: bool = False
    common_prefix_len: int = 0
    cu_prefix_query_lens: torch.Tensor | None = None
    prefix_kv_lens: torch.Tensor | None = None
    suffix_kv_lens: torch.Tensor | None = None
    prefix_scheduler_metadata: torch.Tensor | None = None
    sliding_window: tuple[int, int] | None = None
    mm_prefix_range_tensor: torch.Tensor | None = None


@dataclass
class MetadataTomorrow(FlashAttentionMetadata):
    """A later version's, with a mask that we know nothing of."""

    tree_mask: torch.Tensor | None = None


MASKS += [
    (Metadata026, CUDA_FIELDS | {"sliding_window": (-1, -1)}, True),
    (Metadata026, CUDA_FIELDS | {"use_cascade": True, "common_prefix_len": 512}, False),
    (Metadata026, CUDA_FIELDS | {"common_prefix_len": 512}, False),
    (Metadata026, CUDA_FIELDS | {"mm_prefix_range_tensor": SOME}, False),
    (MetadataTomorrow, CUDA_FIELDS, True),
    (MetadataTomorrow, CUDA_FIELDS | {"tree_mask": SOME}, False),
]


@pytest.mark.parametrize(("kind", "values", "plain"), MASKS, ids=lambda value: str(value)[-60:])
def test_only_plainly_causal_steps_run_sparse(
    kind: type[Any], values: dict[str, Any], plain: bool
) -> None:
    assert compat.is_plain_causal(kind(**values)) == plain
    step = one_prefill(2000, 3000, plain_causal=compat.is_plain_causal(kind(**values)))
    assert step.dense_reasons == ({} if plain else {"attention_mask": 1})


def one_prefill(q_len: int, kv_len: int, **arguments: Any) -> Step:
    starts, seq_lens = torch.tensor([0, q_len]), torch.tensor([kv_len])
    values = {"seq_lens": seq_lens, "profile": uniform_profile()} | arguments
    return sort_requests(starts, **values)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "arguments", "reason"),
    [
        (128, 8192, {}, None),
        (1024, 1024, {}, None),
        (127, 4000, {}, "short_query"),
        (500, 1023, {}, "short_context"),
        (8000, 8193, {}, "long_context"),
        # Verification rows look like a chunk, and their context length is only a bound.
        (200, 4000, {"num_decode_rows": 201}, "short_query"),
        (202, 4000, {"num_decode_rows": 201}, None),
        (500, 4000, {"seq_lens": None}, "unknown_lengths"),
        (500, 4000, {"enabled": False}, "disabled"),
        (500, 4000, {"enabled": False, "plain_causal": False}, "disabled"),
        (500, 4000, {"profile": None}, "no_profile"),
        (500, 4000, {"may_have_adapter": True}, "active_adapter"),
        (500, 4000, {"may_have_adapter": True, "plain_causal": False}, "active_adapter"),
        (500, 4000, {"may_have_adapter": True, "enabled": False}, "disabled"),
    ],
)
def test_a_prefill_outside_of_what_was_calibrated_is_dense(
    q_len: int, kv_len: int, arguments: dict[str, Any], reason: Reason | None
) -> None:
    step = one_prefill(q_len, kv_len, **arguments)
    assert len(step.long_prefills) == (reason is None)
    assert step.dense_reasons == Counter([reason] if reason else [])


def test_drafted_tokens_count_as_decode_rows() -> None:
    config: Any = SimpleNamespace(speculative_config=None)
    assert configuration.num_decode_rows(config) == 1
    config.speculative_config = SimpleNamespace(num_speculative_tokens=5)
    assert configuration.num_decode_rows(config) == 6


def test_a_quantised_output_is_left_to_vllms_dense_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Today's dense backends refuse it themselves, so the request must reach them."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    counted: Counter[str] = Counter()
    monkeypatch.setattr(fallbacks, "count", counted.update)
    rows = torch.zeros(2000, 4, 32)
    step = one_prefill(2000, 3000)
    on_cpu = AfbsCPUMetadata(**CPU_FIELDS, step=step)
    blocks: Any = SimpleNamespace(requests=step.long_prefills)
    on_cuda = AfbsCUDAMetadata(**CUDA_FIELDS, blocks=blocks, meter=Mock(), level=0)
    for platform, metadata in (("cpu", on_cpu), ("cuda", on_cuda)):
        impl = make_impl(platform)
        with pytest.raises(NotImplementedError, match="output quantization"):
            impl.forward(None, rows, rows, rows, rows, metadata, rows, output_scale=SOME)
    assert counted == {"output_quantization": 2}


def test_groups_of_layers_do_not_share_a_steps_metadata() -> None:
    """VLLM would swap the block table of one group's metadata for another's, but not in ours."""
    assert not AfbsCUDAMetadataBuilder.supports_update_block_table


def test_reasons_seen_in_steps_are_logged_once_and_counted_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    fallbacks._log_first.cache_clear()
    for _ in range(3):
        fallbacks.count({"long_context": 2, "short_query": 1, "attention_mask": 0})
        fallbacks.count({"output_quantization": 1, "lora": 1})
    changing, fixed = logged
    assert "long_context" in changing
    assert "output_quantization" in fixed
    counts = {
        sample.labels["reason"]: sample.value
        for family in metric_files.read()
        for sample in family.samples
        if family.name == "vllm_afbs_dense_fallbacks"
    }
    assert counts == {"long_context": 6, "short_query": 3, "output_quantization": 3, "lora": 3}
