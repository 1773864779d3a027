"""The attention backend on CPU: long prefills run sparse, all else in vLLM's own CPU_ATTN."""

import functools
import time
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_afbs import compat, metrics, serving
from vllm_afbs.cpu.sparse import MAX_DENSITY, CacheFormat, SparsePrefill
from vllm_afbs.kernels import TileTables
from vllm_afbs.profile import Profile
from vllm_afbs.serving import LayerPlan
from vllm_afbs.steps import Step, sort_requests

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
        others: Metadata of the other requests alone; None if there are none or no long prefill.
        other_rows: Their rows among the step's tokens.
    """

    step: Step = field(default_factory=Step)
    others: CPUAttentionMetadata | None = None
    other_rows: torch.Tensor | None = None


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
        self.profile = serving.admitted_profile(vllm_config)
        metrics.report_profile(self.profile)
        cache_format = CacheFormat(self.isa, self.block_size, kv_cache_spec.dtype)
        rank = compat.tensor_parallel_rank()
        for name, layer in compat.attention_layers(vllm_config, layer_names).items():
            impl = layer.impl
            plan = serving.plan_layer(
                self.profile,
                compat.layer_index(name),
                impl.num_heads,
                rank,
                impl.unsupported_feature(self.block_size, self.profile),
            )
            impl.configure(plan, cache_format)

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
            whole.block_table,
            self.profile if whole.causal is True and whole.dynamic_causal is None else None,
        )
        metadata = AfbsCPUMetadata(
            **{item.name: getattr(whole, item.name) for item in fields(whole)}, step=step
        )
        if step.long_prefills and step.others:
            metadata.other_rows, common = _only(common_attn_metadata, step.others)
            metadata.others = super().build(0, common, fast_build)
        return metadata


def _only(
    common: CommonAttentionMetadata, requests: list[int]
) -> tuple[torch.Tensor, CommonAttentionMetadata]:
    """The rows of some of a step's requests, and the step's metadata as if it held only these."""
    starts = common.query_start_loc_cpu.tolist()
    rows = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in requests])
    index = torch.tensor(requests)
    query_lens = common.query_start_loc_cpu.diff()[index]
    query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
    query_start_loc[1:] = query_lens.cumsum(0)
    seq_lens = common.seq_lens[index]
    return rows, replace(
        common,
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        num_reqs=len(requests),
        num_actual_tokens=len(rows),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[rows],
    )


class AfbsCPUImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    _plan: LayerPlan
    _sparse: SparsePrefill | None

    def unsupported_feature(self, page_size: int, profile: Profile | None) -> str | None:
        """Names what keeps this layer from running sparse whatever its thresholds; or None."""
        conditions = {
            "attention_type": self.attn_type != AttentionType.DECODER,
            "kv_sharing": self.kv_sharing_target_layer_name is not None,
            "kv_cache_dtype": self.is_fp8_kv_cache,
            "sliding_window": self.sliding_window != -1,
            "alibi": self.alibi_slopes is not None,
            "softcap": bool(self.logits_soft_cap),
            "sinks": self.sinks is not None,
            "page_size": profile is not None and profile.block_k % page_size != 0,
        }
        return next((name for name, holds in conditions.items() if holds), None)

    def configure(self, plan: LayerPlan, cache_format: CacheFormat) -> None:
        """Takes the layer's plan; the metadata builder calls this before the first step."""
        self._plan = plan
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
        dense = functools.partial(
            super().forward,
            layer,
            key=key,
            value=value,
            kv_cache=kv_cache,
            output_scale=output_scale,
            output_block_scale=output_block_scale,
        )
        # In vLLM's warm-up there is no metadata, and nothing to attend to.
        if not isinstance(attn_metadata, AfbsCPUMetadata) or not attn_metadata.step.has_prefill:
            return dense(query=query, attn_metadata=attn_metadata, output=output)

        start_seconds = time.perf_counter()
        tables = self._choose(query, kv_cache, attn_metadata.step)
        if self._sparse is None or not tables:
            path = "dense"
            dense(query=query, attn_metadata=attn_metadata, output=output)
        else:
            path = "sparse"
            for request, its_tables in zip(attn_metadata.step.long_prefills, tables, strict=True):
                self._sparse.attend(query, output, kv_cache, request, its_tables)
            if attn_metadata.others is not None:
                rows = attn_metadata.other_rows
                others = torch.empty_like(output[rows])
                dense(query=query[rows], attn_metadata=attn_metadata.others, output=others)
                output[rows] = others
        metrics.PREFILL_ATTENTION_SECONDS.observe(time.perf_counter() - start_seconds, path)
        return output

    def _choose(self, query: torch.Tensor, kv_cache: torch.Tensor, step: Step) -> list[TileTables]:
        """Tiles of the step's long prefills; none where the parent is to do the whole step."""
        metrics.count_fallbacks(step.dense_reasons)
        num_long = len(step.long_prefills)
        num_blocks = self.num_heads * sum(r.geometry.num_visible for r in step.long_prefills)
        num_kept = num_blocks
        tables: list[TileTables] = []
        if self._sparse is None:
            metrics.count_fallbacks({str(self._plan.dense_reason): num_long})
        elif num_long:
            start_seconds = time.perf_counter()
            keeps = [self._sparse.select(query, kv_cache, each) for each in step.long_prefills]
            num_selected = sum(int(keep.sum()) for keep in keeps)
            if num_selected > MAX_DENSITY * num_blocks:
                metrics.count_fallbacks({"low_sparsity": num_long})
            else:
                num_kept = num_selected
                tables = [
                    self._sparse.tables(keep, request)
                    for keep, request in zip(keeps, step.long_prefills, strict=True)
                ]
            metrics.SELECTOR_SECONDS.observe(time.perf_counter() - start_seconds)
        metrics.count_products(self._plan.layer, num_kept, num_blocks)
        return tables
