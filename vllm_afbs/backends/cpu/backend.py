"""The attention backend on CPU: long prefills run sparse, all else in vLLM's own CPU_ATTN."""

import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_afbs import compat
from vllm_afbs.backends.cpu.meter import HostMeter, LayerWork
from vllm_afbs.backends.cpu.sparse import MAX_DENSITY, CacheFormat, SparsePrefill
from vllm_afbs.kernels import TileTables
from vllm_afbs.observability import metrics
from vllm_afbs.observability.kill_switch import Switch
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, eligibility, reasons
from vllm_afbs.serving.admission import LayerPlan
from vllm_afbs.serving.batch import Others, Step, restrict, sort_requests
from vllm_afbs.serving.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AfbsCPUBackend(CPUAttentionBackend):
    """CPU_ATTN with sparse prefill; cache layout and decode are the parent's."""

    @staticmethod
    def get_name() -> str:
        """The name behind ``--attention-backend``."""
        return compat.BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["AfbsCPUImpl"]:
        """The layer's implementation."""
        return AfbsCPUImpl

    @staticmethod
    def get_builder_cls() -> type["AfbsCPUMetadataBuilder"]:
        """The step's metadata builder."""
        return AfbsCPUMetadataBuilder


@dataclass
class AfbsCPUMetadata(CPUAttentionMetadata):
    """The parent's metadata and the step's requests sorted into long prefills and others.

    Attributes:
        step: The sorted requests.
        others: The other requests; None if there are none or no long prefill.
    """

    step: Step = field(default_factory=Step)
    others: Others | None = None


class AfbsCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the parent's metadata and tells each layer what its profile says."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        """Reads the admitted profile and hands each layer its plan."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.profile = admission.admitted_profile(vllm_config)
        metrics.report_profile(self.profile)
        self._switch = Switch()
        self._num_decode_rows = compat.num_decode_rows(vllm_config)
        meter = HostMeter(admission.read_settings(vllm_config))
        cache_format = CacheFormat(self.isa, self.block_size, kv_cache_spec.dtype)
        for impl, plan in admission.plan_layers(vllm_config, layer_names, self.block_size):
            impl.configure(plan, cache_format, meter)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AfbsCPUMetadata:
        """Builds a step's metadata; see the parent."""
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step = sort_requests(
            common_attn_metadata.query_start_loc_cpu,
            whole.seq_lens,
            self.profile,
            plain_causal=compat.is_plain_causal(whole),
            enabled=whole.max_query_len == 1 or self._switch.is_enabled(),
            num_decode_rows=self._num_decode_rows,
        )
        metadata = AfbsCPUMetadata(
            **{item.name: getattr(whole, item.name) for item in fields(whole)}, step=step
        )
        if step.long_prefills and step.others:
            rows, common = restrict(common_attn_metadata, step.others)
            metadata.others = Others(rows, super().build(0, common, fast_build))
        return metadata


class AfbsCPUImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    _plan: LayerPlan
    _meter: HostMeter
    _sparse: SparsePrefill | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Notes what vLLM asks for; arguments are the parent's."""
        super().__init__(*args, **kwargs)
        self.unknown_arguments = eligibility.unknown_arguments(super().__init__, args, kwargs)

    def unsupported_feature(self, page_size: int, profile: Profile | None) -> Reason | None:
        """Names what keeps this layer from running sparse whatever its thresholds; or None."""
        return eligibility.first_true(
            eligibility.layer_limits(self, page_size, profile)
            | {
                "sliding_window": eligibility.window_hides_keys(self.sliding_window, profile),
                "softcap": bool(self.logits_soft_cap),
            }
        )

    def configure(self, plan: LayerPlan, cache_format: CacheFormat, meter: HostMeter) -> None:
        """Takes the layer's plan; the metadata builder calls this before the first step."""
        self._plan, self._meter = plan, meter
        self._sparse = None
        if plan.thresholds is not None:
            self._sparse = SparsePrefill(
                plan.thresholds, self.num_kv_heads, self.head_size, self.scale, cache_format
            )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; shapes and arguments are the parent's."""
        parent = super().forward

        def dense(
            query: torch.Tensor, metadata: CPUAttentionMetadata | None, output: torch.Tensor
        ) -> torch.Tensor:
            return parent(
                layer, query, key, value, kv_cache, metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip

        # In vLLM's warm-up there is no metadata, and nothing to attend to.
        if not isinstance(attn_metadata, AfbsCPUMetadata) or not attn_metadata.step.has_prefill:
            return dense(query, attn_metadata, output)

        step = attn_metadata.step
        if output_scale is not None or output_block_scale is not None:
            reasons.count({"output_quantization": step.num_prefills})
            return dense(query, attn_metadata, output)
        started = time.perf_counter()
        keeps, num_kept = self._select(query, kv_cache, attn_metadata)
        tables = self._tables(keeps, attn_metadata)
        chosen = time.perf_counter()
        if self._sparse is None or not tables:
            dense(query, attn_metadata, output)
            attended = time.perf_counter()
        else:
            for request, its_tables in zip(step.long_prefills, tables, strict=True):
                self._sparse.attend(query, output, kv_cache, request, its_tables)
            attended = time.perf_counter()
            if attn_metadata.others is not None:
                attn_metadata.others.attend(dense, query, output)
        ended = time.perf_counter()
        self._meter.add(LayerWork(self._plan, step, num_kept, started, chosen, attended, ended))
        if tables and self._meter.is_sampled():
            reference = torch.empty_like(output)
            started = time.perf_counter()
            dense(query, attn_metadata, reference)
            seconds = time.perf_counter() - started
            self._meter.add_sample(self._plan, step, output, reference, seconds)
        return output

    def _select(
        self, query: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: AfbsCPUMetadata
    ) -> tuple[list[torch.Tensor], list[int]]:
        """Kept blocks of the step's long prefills, and how many by head.

        Both are empty where the parent is to do the whole step.
        """
        step, block_table = attn_metadata.step, attn_metadata.block_table
        reasons.count(step.dense_reasons)
        num_long = len(step.long_prefills)
        if self._sparse is None:
            if self._plan.dense_reason is not None:
                reasons.count({self._plan.dense_reason: num_long})
            return [], []
        if not num_long:
            return [], []
        keeps = [
            self._sparse.select(query, kv_cache, each, block_table[each.table_row])
            for each in step.long_prefills
        ]
        num_kept = torch.stack([keep.sum((1, 2)) for keep in keeps]).sum(0)
        if int(num_kept.sum()) > MAX_DENSITY * self.num_heads * step.num_visible:
            reasons.count({"dense_is_faster": num_long})
            return [], []
        return keeps, num_kept.tolist()

    def _tables(
        self, keeps: list[torch.Tensor], attn_metadata: AfbsCPUMetadata
    ) -> list[TileTables]:
        """The kept blocks as tiles."""
        if self._sparse is None:
            return []
        requests = attn_metadata.step.long_prefills if keeps else []
        return [
            self._sparse.tables(keep, request, attn_metadata.block_table[request.table_row])
            for keep, request in zip(keeps, requests, strict=True)
        ]
