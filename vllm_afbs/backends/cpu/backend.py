"""The attention backend on the CPU: long prefills run sparse, the rest in vLLM's CPU_ATTN."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from vllm_afbs.backends.cpu.key_pages import UnknownPackingError
from vllm_afbs.backends.cpu.meter import HostMeter, LayerWork
from vllm_afbs.backends.cpu.sparse import MAX_DENSITY, CacheFormat, SparsePrefill
from vllm_afbs.backends.shared import (
    StepSorter,
    add_builder,
    attend_dense_requests,
    extend_metadata,
)
from vllm_afbs.kernels import TileTables
from vllm_afbs.observability import fallbacks
from vllm_afbs.observability.membership import join_server
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import eligibility, summary
from vllm_afbs.serving.admission import expected_block_k, start_level
from vllm_afbs.serving.batch import DenseRequests, Step, restrict
from vllm_afbs.serving.pages import split_page_sizes
from vllm_afbs.serving.plan import LayerPlan, plan_layers
from vllm_afbs.serving.reasons import Reason
from vllm_afbs.serving.settings import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.afbs")


class AfbsCPUBackend(CPUAttentionBackend):
    """CPU_ATTN with sparse prefill; the cache layout and decoding are CPU_ATTN's own."""

    @staticmethod
    def get_name() -> str:
        """The name for ``--attention-backend``."""
        return compat.BACKEND_NAME

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """The page sizes into which vLLM may split blocks; arguments are vLLM's."""
        given = () if kv_cache_spec is None else (kv_cache_spec,)
        sizes = super().get_supported_kernel_block_sizes(*given)
        # Larger pages than key blocks would leave every layer dense, so no user wants them.
        return split_page_sizes(sizes, expected_block_k(compat.current_config()))

    @staticmethod
    def get_impl_cls() -> type["AfbsCPUImpl"]:
        """The layer's implementation."""
        return AfbsCPUImpl

    @staticmethod
    def get_builder_cls() -> type["AfbsCPUMetadataBuilder"]:
        """The builder of a step's metadata."""
        return AfbsCPUMetadataBuilder


@dataclass(kw_only=True)
class AfbsCPUMetadata(CPUAttentionMetadata):
    """CPU_ATTN's metadata of a whole step, and the step's requests sorted.

    Attributes:
        step: The sorted requests.
        dense_requests: The requests that run dense while long prefills run sparse; None if all
            requests run the same way.
    """

    step: Step
    dense_requests: DenseRequests | None = None


@dataclass(frozen=True)
class ServedLayer:
    """What the metadata builder gives a layer for one level before its first step.

    Attributes:
        plan: The layer's thresholds at the level, or why it runs dense.
        sparse: Its sparse prefill; None if the layer runs dense.
        meter: Where the layer reports its work; shared by all layers of a builder.
        always_sparse: Whether it also runs sparse where dense is expected to be faster.
    """

    plan: LayerPlan
    sparse: SparsePrefill | None
    meter: HostMeter
    always_sparse: bool = False


class AfbsCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the metadata of each step, and gives each layer what it serves."""

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        """Gives each layer what it serves by the admitted profile; arguments are vLLM's."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        profile = join_server(vllm_config)
        self._sorter = StepSorter(vllm_config)
        self._meter = HostMeter(read_settings(vllm_config))
        self._cache_format = CacheFormat(self.isa, self.block_size, kv_cache_spec.dtype)
        self.serve(profile)
        add_builder(self)

    def serve(self, profile: Profile | None, always_sparse: bool = False) -> None:
        """See ``shared.Builder``."""
        self._sorter.serve(profile)
        start = start_level(self.vllm_config, profile)
        final = []
        for impl, plans in plan_layers(
            self.vllm_config, profile, self.layer_names, self.block_size
        ):
            if plans[start].is_local:
                impl.step_aside()
                final.append(plans[start])
                continue
            served = [
                impl.prepare(plan, self._cache_format, self._meter, always_sparse) for plan in plans
            ]
            impl.serve(*served)
            final.append(served[start].plan)
        self._steps_aside = all(plan.is_local for plan in final)
        summary.report(self.vllm_config, profile, self.layer_names, final)

    def finish_reports(self) -> None:
        """See ``shared.Builder``; the CPU's meter reports at once."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """Builds a step's metadata; arguments are vLLM's.

        Layers without full attention get CPU_ATTN's own metadata.
        """
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._steps_aside:
            return whole
        step = self._sorter.sort(
            common_attn_metadata, whole.seq_lens, compat.is_plain_causal(whole)
        )
        metadata = extend_metadata(AfbsCPUMetadata, whole, step=step)
        if step.long_prefills and step.dense_indices:
            rows, common = restrict(common_attn_metadata, step.dense_indices)
            metadata.dense_requests = DenseRequests(rows, super().build(0, common, fast_build))
        return metadata


class AfbsCPUImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    _served: tuple[ServedLayer, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Notes which arguments we do not know; arguments are vLLM's."""
        super().__init__(*args, **kwargs)
        self.unknown_arguments = eligibility.unknown_arguments(super().__init__, args, kwargs)

    @property
    def window(self) -> int:
        """Keys that a row sees, itself included; below 1 for all."""
        return int(self.sliding_window)

    def unsupported_feature(self, page_size: int, profile: Profile | None) -> Reason | None:
        """The reason why this layer cannot run sparse with any thresholds; None if it can."""
        return eligibility.first_true(
            eligibility.layer_obstacles(self, page_size, profile)
            | {
                "local_attention": eligibility.window_hides_keys(self.window, profile),
                "kv_cache_dtype": self.kv_cache_dtype not in eligibility.PLAIN_CACHE_DTYPES,
            }
        )

    def prepare(
        self,
        plan: LayerPlan,
        cache_format: CacheFormat,
        meter: HostMeter,
        always_sparse: bool = False,
    ) -> ServedLayer:
        """Prepares what this layer serves at one level: sparse prefill if its plan is sparse."""
        if plan.thresholds is None:
            return ServedLayer(plan, None, meter)
        try:
            sparse = SparsePrefill(
                plan.thresholds,
                self.num_kv_heads,
                self.head_size,
                self.scale,
                cache_format,
                float(self.logits_soft_cap),
            )
        except UnknownPackingError as error:
            logger.warning("Layer %d cannot read its cache: %s.", plan.layer, error)
            return ServedLayer(
                replace(plan, thresholds=None, dense_reason="cache_layout"), None, meter
            )
        return ServedLayer(plan, sparse, meter, always_sparse)

    def serve(self, *served: ServedLayer) -> None:
        """Takes what the layer serves at each level; the metadata builder calls this first."""
        vars(self).pop("forward", None)  # it may have stepped aside
        self._served = served

    def step_aside(self) -> None:
        """Puts CPU_ATTN's ``forward`` in place of ours, for layers without full attention."""
        self.forward = super().forward  # type: ignore[method-assign, assignment]

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
        **unknown: Any,
    ) -> torch.Tensor:
        """Attends; shapes and arguments are vLLM's, those of a later version included."""
        # vLLM warms up without metadata.
        if isinstance(attn_metadata, AfbsCPUMetadata) and attn_metadata.step.has_prefill:
            if output_scale is None and output_block_scale is None:
                self._attend_prefills(
                    layer, query, key, value, kv_cache, attn_metadata, output, **unknown
                )
                return output
            fallbacks.count({"output_quantization": attn_metadata.step.num_prefills})
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output,
            output_scale, output_block_scale, **unknown,
        )  # fmt: skip

    def _attend_prefills(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AfbsCPUMetadata,
        output: torch.Tensor,
        **unknown: Any,
    ) -> None:
        """Attends in a step that has prefills, and reports the work; see ``forward``."""
        step = metadata.step
        served = self._served[step.level]
        plan, sparse, meter = served.plan, served.sparse, served.meter
        started = time.perf_counter()
        tables, num_kept = self._choose_tiles(served, query, kv_cache, metadata, unknown)
        chosen = time.perf_counter()
        if sparse is None or not tables:
            super().forward(layer, query, key, value, kv_cache, metadata, output, **unknown)
            attended = time.perf_counter()
        else:
            for request, its_tables in zip(step.long_prefills, tables, strict=True):
                # vLLM fills a layer's sinks after it has made the layer.
                sparse.attend(query, output, kv_cache, request, its_tables, self.sinks)
            attended = time.perf_counter()
            if metadata.dense_requests is not None:
                attend_dense_requests(
                    super().forward, layer, query, key, value, kv_cache,
                    metadata.dense_requests, output,
                )  # fmt: skip
        ended = time.perf_counter()
        meter.add(LayerWork(plan, step, num_kept, started, chosen, attended, ended))
        if tables and meter.is_sampled():
            reference = torch.empty_like(output)
            started = time.perf_counter()
            super().forward(layer, query, key, value, kv_cache, metadata, reference)
            meter.add_sample(plan, step, output, reference, time.perf_counter() - started)

    def _choose_tiles(
        self,
        served: ServedLayer,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AfbsCPUMetadata,
        unknown: Mapping[str, Any],
    ) -> tuple[list[TileTables], list[int]]:
        """Chooses the blocks of the step's long prefills, and counts why prefills run dense.

        Returns:
            The tiles of each long prefill, and the number of kept blocks by head. Both are empty
            if vLLM's dense backend has to do the whole step.
        """
        plan, sparse, step = served.plan, served.sparse, metadata.step
        fallbacks.count(step.dense_reasons)
        num_long = len(step.long_prefills)
        if sparse is None:
            if plan.dense_reason is not None:
                fallbacks.count({plan.dense_reason: num_long})
            return [], []
        if not num_long:
            return [], []
        obstacle: Reason | None = "unknown_argument" if unknown else None
        if obstacle is None and not sparse.can_read(kv_cache):
            obstacle = "cache_layout"
        if obstacle is not None:
            fallbacks.count({obstacle: num_long})
            return [], []
        requests = [(each, metadata.block_table[each.table_row]) for each in step.long_prefills]
        keeps = [sparse.select(query, kv_cache, request, pages) for request, pages in requests]
        num_kept = torch.stack([keep.sum((1, 2)) for keep in keeps]).sum(0)
        most_kept = MAX_DENSITY * self.num_heads * step.num_visible
        if int(num_kept.sum()) > most_kept and not served.always_sparse:
            fallbacks.count({"dense_is_faster": num_long})
            return [], []
        tables = [
            sparse.tables(keep, request, pages)
            for keep, (request, pages) in zip(keeps, requests, strict=True)
        ]
        return tables, num_kept.tolist()
