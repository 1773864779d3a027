"""The attention backend on CUDA: long prefills run sparse, all else in vLLM's FlashAttention."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_afbs import compat
from vllm_afbs.backends.cuda.dispatch import Way, dense_seconds, fastest_way
from vllm_afbs.backends.cuda.meter import DeviceMeter, LayerWork, mark
from vllm_afbs.backends.cuda.sparse import (
    Layer,
    SparsePrefill,
    StepInputs,
    TilePrefill,
    TritonPrefill,
    can_cut,
)
from vllm_afbs.backends.cuda.warmup import LayerShape, compile_kernels
from vllm_afbs.kernels.query_blocks import QueryBlocks, cut_query_blocks
from vllm_afbs.observability import metrics
from vllm_afbs.observability.kill_switch import Switch
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, eligibility, reasons
from vllm_afbs.serving.admission import LayerPlan
from vllm_afbs.serving.batch import Others, Step, restrict, sort_requests
from vllm_afbs.serving.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PAGE_SIZE = 128
"""With pages as long as FlashAttention 3's key tiles, the copy engine fetches them whole."""


class AfbsCUDABackend(FlashAttentionBackend):
    """FlashAttention with sparse prefill; cache layout, decode and CUDA graphs are the parent's."""

    @staticmethod
    def get_name() -> str:
        """The name behind ``--attention-backend``."""
        return compat.BACKEND_NAME

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The page size where the user names none."""
        return int(super().get_preferred_block_size(max(default_block_size, PAGE_SIZE)))

    @staticmethod
    def get_impl_cls() -> type["AfbsCUDAImpl"]:
        """The layer's implementation."""
        return AfbsCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["AfbsCUDAMetadataBuilder"]:
        """The step's metadata builder."""
        return AfbsCUDAMetadataBuilder


@dataclass
class AfbsCUDAMetadata(FlashAttentionMetadata):
    """The parent's metadata of a step that has long prefills, and what these need.

    Attributes:
        blocks: The long prefills' query blocks.
        others: The other requests; None if there are none.
    """

    blocks: QueryBlocks | None = None
    others: Others | None = None


class AfbsCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Builds the parent's metadata and tells each layer what its profile says."""

    supports_update_block_table = False
    """vLLM would give a step's metadata to a second group of layers with another block table, and
    that of the other requests (``AfbsCUDAMetadata.others``) would keep the first group's."""

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
        plans = list(admission.plan_layers(vllm_config, layer_names, kv_cache_spec.block_size))
        self._plans = [plan for _, plan in plans]
        meter = DeviceMeter(self._plans, admission.read_settings(vllm_config), device)
        for slot, (impl, plan) in enumerate(plans):
            impl.configure(plan, slot, meter, device)
            if self.profile is not None:
                impl.warm_up(
                    self.profile, vllm_config.model_config, kv_cache_spec.block_size, device
                )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """Builds a step's metadata; see the parent.

        A step without long prefills gets the parent's own metadata, and its layers the parent's
        own work.
        """
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if common_attn_metadata.max_query_len == 1:
            return whole
        step = sort_requests(
            common_attn_metadata.query_start_loc_cpu,
            compat.host_seq_lens(common_attn_metadata),
            self.profile,
            plain_causal=compat.is_plain_causal(whole),
            enabled=self._switch.is_enabled(),
            num_decode_rows=self._num_decode_rows,
        )
        self._count_dense(step)
        if not step.long_prefills:
            return whole
        metadata = AfbsCUDAMetadata(
            **{item.name: getattr(whole, item.name) for item in fields(whole)},
            blocks=cut_query_blocks(step.long_prefills, self.device),
        )
        if step.others:
            rows, common = restrict(common_attn_metadata, step.others)
            metadata.others = Others(rows, super().build(0, common, fast_build=True))
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata:
        """Builds the parent's metadata: a captured graph replays dense attention only."""
        return super().build(0, common_attn_metadata)

    def _count_dense(self, step: Step) -> None:
        """Counts prefills that layers leave to the parent, as each layer would."""
        num_layers, num_long = len(self._plans), len(step.long_prefills)
        counts = Counter({why: n * num_layers for why, n in step.dense_reasons.items()})
        if num_long:
            for plan in self._plans:
                if plan.dense_reason is not None:
                    counts[plan.dense_reason] += num_long
        reasons.count(counts)
        metrics.count_tokens("dense", step.num_dense_tokens * num_layers)


class AfbsCUDAImpl(FlashAttentionImpl):
    """One layer's attention."""

    _plan: LayerPlan
    _slot: int
    _meter: DeviceMeter
    _ways: dict[Way, SparsePrefill]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Notes what vLLM asks for; arguments are the parent's."""
        super().__init__(*args, **kwargs)
        self.unknown_arguments = eligibility.unknown_arguments(super().__init__, args, kwargs)

    def unsupported_feature(self, page_size: int, profile: Profile | None) -> Reason | None:
        """Names what keeps this layer from running sparse whatever its thresholds; or None."""
        return eligibility.first_true(
            eligibility.layer_limits(self, page_size, profile)
            | {
                # FlashAttention counts the keys before a row.
                "sliding_window": eligibility.window_hides_keys(
                    self.sliding_window[0] + 1, profile
                ),
                "flash_attention_version": self.vllm_flash_attn_version != 3,
                "block_size": profile is not None
                and not can_cut(profile.block_q, profile.block_k, self.head_size),
            }
        )

    def configure(
        self, plan: LayerPlan, slot: int, meter: DeviceMeter, device: torch.device
    ) -> None:
        """Takes the layer's plan; the metadata builder calls this before the first step."""
        self._plan, self._slot, self._meter, self._ways = plan, slot, meter, {}
        if plan.dense_reason == "no_profile":
            # Nothing of ours runs in this server, so not even our look at each step is in the way.
            self.forward = super().forward  # type: ignore[method-assign]
        if plan.thresholds is not None:
            layer = Layer(plan.thresholds.to(device), self.scale, float(self.logits_soft_cap))
            self._ways = {"tiles": TilePrefill(layer), "triton": TritonPrefill(layer)}

    def warm_up(
        self, profile: Profile, model_config: Any, page_size: int, device: torch.device
    ) -> None:
        """Compiles the layer's kernels; layers alike share them, so only the first takes long."""
        shape = LayerShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            dtype=model_config.dtype,
            page_size=page_size,
            block_q=profile.block_q,
            block_k=profile.block_k,
        )
        longest = min(profile.max_seq_len, model_config.max_model_len)
        compile_kernels(self._ways.values(), shape, profile.min_seq_len, longest, device)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; shapes and arguments are the parent's."""
        parent = super().forward
        if not isinstance(attn_metadata, AfbsCUDAMetadata):
            return parent(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip

        def dense(
            query: torch.Tensor, metadata: FlashAttentionMetadata, output: torch.Tensor
        ) -> None:
            parent(
                layer, query, key, value, kv_cache, metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip

        if output_scale is not None or output_block_scale is not None:
            blocks = attn_metadata.blocks
            reasons.count({"output_quantization": len(blocks.requests) if blocks else 0})
            dense(query, attn_metadata, output)
        else:
            self._attend_long(query, kv_cache, attn_metadata, output, dense)
        return output

    def _attend_long(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AfbsCUDAMetadata,
        output: torch.Tensor,
        dense: Callable[[torch.Tensor, FlashAttentionMetadata, torch.Tensor], None],
    ) -> None:
        blocks = metadata.blocks
        assert blocks is not None  # this metadata is made for steps that have long prefills
        prefill = self._choose_way(blocks)
        started, chosen_at, attended_at = mark(), None, None
        if prefill is None:
            if self._ways:
                reasons.count({"dense_is_faster": len(blocks.requests)})
            dense(query, metadata, output)
        else:
            key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            step = StepInputs(query, key_cache, value_cache, metadata.block_table, blocks)
            chosen = prefill.choose(step, self._meter.counter(self._slot))
            chosen_at = mark()
            prefill.attend(step, chosen, output)
            if metadata.others is not None:
                attended_at = mark()
                metadata.others.attend(dense, query, output)
        ended = mark()
        is_sampled = prefill is not None and self._meter.is_sampled()
        if is_sampled:
            reference = torch.empty_like(output)
            dense(query, metadata, reference)
            self._meter.add_sample(self._slot, output, reference, blocks.requests)
        self._meter.add(
            LayerWork(
                slot=self._slot,
                path="dense" if prefill is None else "sparse",
                num_tokens=blocks.num_rows,
                num_blocks=blocks.num_visible,
                dense_seconds=self._dense_seconds(blocks),
                started=started,
                chosen=chosen_at,
                attended=attended_at,
                ended=ended,
                is_sampled=is_sampled,
            )
        )

    def _dense_seconds(self, blocks: QueryBlocks) -> float:
        """What dense attention of the long prefills takes, estimated."""
        kv_len = blocks.requests[0].geometry.kv_len
        return dense_seconds(self.head_size, kv_len, self.num_heads * blocks.num_scores)

    def _choose_way(self, blocks: QueryBlocks) -> SparsePrefill | None:
        """The fastest way for what the profile promises; None where the parent is."""
        if not self._ways:
            return None
        kv_len = blocks.requests[0].geometry.kv_len
        density = 1.0 - self._plan.expected_sparsity(kv_len)
        num_scores = self.num_heads * blocks.num_visible * blocks.block_q * blocks.block_k
        return self._ways.get(fastest_way(self.head_size, kv_len, density, num_scores))
