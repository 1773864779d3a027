"""The attention backend on CUDA: long prefills run sparse, the rest in vLLM's FlashAttention."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadata,
)

from vllm_afbs import compat
from vllm_afbs.backends.cuda.card import Card
from vllm_afbs.backends.cuda.dispatch import (
    KernelChoice,
    LayerKind,
    dense_seconds,
    fastest_kernel,
    variant_name,
)
from vllm_afbs.backends.cuda.graphs import CapturesDecodesOnly
from vllm_afbs.backends.cuda.kv_cache import FP8_DTYPES, is_readable, step_inputs
from vllm_afbs.backends.cuda.metadata import AfbsCUDAMetadata, ServedLayer
from vllm_afbs.backends.cuda.meter import DeviceMeter, LayerWork, mark
from vllm_afbs.backends.cuda.pages import SplitsBlocks, are_readable
from vllm_afbs.backends.cuda.sparse import Layer, SparsePrefill, make_prefills
from vllm_afbs.backends.cuda.warmup import LayerShape, compile_kernels
from vllm_afbs.backends.cuda.workspace import show_workspace
from vllm_afbs.backends.shared import (
    StepSorter,
    add_builder,
    attend_dense_requests,
    count_dense,
    extend_metadata,
)
from vllm_afbs.kernels import QueryBlocks, cut_query_blocks
from vllm_afbs.observability import fallbacks
from vllm_afbs.observability.membership import join_server
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving import admission, eligibility, summary
from vllm_afbs.serving.batch import DenseRequests, restrict
from vllm_afbs.serving.plan import LayerPlan, plan_layers
from vllm_afbs.serving.reasons import Reason
from vllm_afbs.serving.settings import read_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AfbsCUDABackend(SplitsBlocks):
    """FlashAttention with sparse prefill.

    The cache layout, decoding and CUDA graphs are FlashAttention's own.
    """

    @staticmethod
    def get_name() -> str:
        """The name for ``--attention-backend``."""
        return compat.BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["AfbsCUDAImpl"]:
        """The layer's implementation."""
        return AfbsCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["AfbsCUDAMetadataBuilder"]:
        """The builder of a step's metadata."""
        return AfbsCUDAMetadataBuilder


class AfbsCUDAMetadataBuilder(CapturesDecodesOnly):
    """Builds the metadata of each step, and gives each layer what it serves."""

    supports_update_block_table = False
    """If True, vLLM would reuse a step's metadata for a second group of layers and replace its
    block table. The block table in ``AfbsCUDAMetadata.dense_requests`` would stay the first's."""

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
        self.serve(profile)
        add_builder(self)

    def serve(self, profile: Profile | None, always_sparse: bool = False) -> None:
        """See ``shared.Builder``."""
        vllm_config, device = self.vllm_config, self.device
        page_size = self.kv_cache_spec.block_size
        self._sorter.serve(profile)
        start = admission.start_level(vllm_config, profile)
        planned = list(plan_layers(vllm_config, profile, self.layer_names, page_size))
        final = [plans[start] for _, plans in planned]
        summary.report(vllm_config, profile, self.layer_names, final)
        for impl, plans in planned:
            if plans[start].is_local:
                impl.step_aside()
        layers = [(impl, plans) for impl, plans in planned if not plans[start].is_local]
        self._plans = [plans for _, plans in layers]
        # Without such layers, every step has FlashAttention's own metadata: its answer holds again.
        self.supports_update_block_table = not layers and super().supports_update_block_table
        counted = [plans[start] for plans in self._plans]  # the same counters at every level
        self._meter = DeviceMeter(counted, read_settings(vllm_config), device)
        for slot, (impl, plans) in enumerate(layers):
            if profile is None:
                impl.step_aside()
                continue
            # The thresholds of all levels stay on the device, so a step in flight keeps its own.
            served = [
                ServedLayer(plan, slot, impl.sparse_prefills(plan, device), always_sparse)
                for plan in plans
            ]
            impl.serve(*served)
            if prefills := next((each.prefills for each in served if each.prefills), None):
                model_config = vllm_config.model_config
                shape = LayerShape.of(impl, profile, model_config, page_size)
                longest = min(profile.max_seq_len, model_config.max_model_len)
                # Layers of one shape share their kernels, so only the first takes long.
                compile_kernels(prefills.values(), shape, profile.min_seq_len, longest, device)

    def finish_reports(self) -> None:
        """See ``shared.Builder``."""
        self._meter.finish()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """Builds a step's metadata; arguments are vLLM's.

        A step without long prefills gets FlashAttention's own metadata, and so does every step of
        layers without full attention. They then do what they do under FlashAttention.
        """
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self._plans or common_attn_metadata.max_query_len == 1:
            return whole
        seq_lens = compat.host_seq_lens(common_attn_metadata)
        plain_causal = compat.is_plain_causal(whole)
        step = self._sorter.sort(common_attn_metadata, seq_lens, plain_causal)
        count_dense(step, [plans[step.level] for plans in self._plans])
        if not step.long_prefills:
            return whole
        blocks = cut_query_blocks(step.long_prefills, self.device)
        metadata = extend_metadata(
            AfbsCUDAMetadata, whole, blocks=blocks, meter=self._meter, level=step.level
        )
        if step.dense_indices:
            rows, common = restrict(common_attn_metadata, step.dense_indices)
            dense = super().build(0, common, fast_build=True)
            metadata.dense_requests = DenseRequests(rows, dense)
        return metadata

    def count_masked_step(self, common: CommonAttentionMetadata) -> None:
        """Counts a step that another backend runs because its mask is not causal."""
        if self._plans and common.max_query_len > 1:
            seq_lens = compat.host_seq_lens(common)
            step = self._sorter.sort(common, seq_lens, plain_causal=False)
            count_dense(step, [plans[step.level] for plans in self._plans])

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> FlashAttentionMetadata:
        """Builds FlashAttention's own metadata: captured graphs replay only dense attention."""
        return super().build(0, common_attn_metadata)


class AfbsCUDAImpl(FlashAttentionImpl):
    """One layer's attention."""

    _served: tuple[ServedLayer, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Notes which arguments we do not know; arguments are vLLM's."""
        super().__init__(*args, **kwargs)
        self._vllm_config = compat.current_config()
        self.card = Card.of_worker(self.vllm_flash_attn_version)
        self.unknown_arguments = eligibility.unknown_arguments(super().__init__, args, kwargs)

    @property
    def window(self) -> int:
        """Keys that a row sees, itself included; below 1 for all."""
        return int(self.sliding_window[0]) + 1  # FlashAttention counts the keys before a row

    def unsupported_feature(self, page_size: int, profile: Profile | None) -> Reason | None:
        """The reason why this layer cannot run sparse with any thresholds; None if it can."""
        return eligibility.first_true(
            eligibility.layer_obstacles(self, page_size, profile)
            | {
                "page_size": profile is not None and not are_readable(page_size, profile.block_k),
                "local_attention": eligibility.window_hides_keys(self.window, profile),
                "kv_cache_dtype": self.kv_cache_dtype
                not in (*eligibility.PLAIN_CACHE_DTYPES, *FP8_DTYPES),
            }
            | self.card.obstacles(self.head_size, profile)
        )

    def sparse_prefills(
        self, plan: LayerPlan, device: torch.device
    ) -> dict[KernelChoice, SparsePrefill]:
        """Prepares this layer's sparse prefill with each kernel; empty if its plan is dense."""
        if plan.thresholds is None:
            return {}
        layer = Layer(plan.thresholds.to(device), self.scale, float(self.logits_soft_cap))
        return make_prefills(layer, self.card.flash_attention_version)

    def serve(self, *served: ServedLayer) -> None:
        """Takes what the layer serves at each level; the metadata builder calls this first."""
        vars(self).pop("forward", None)  # it may have stepped aside
        self._served = served

    def step_aside(self) -> None:
        """Puts FlashAttention's ``forward`` in place of ours.

        For servers without a profile and for layers without full attention. Nothing of ours runs
        there, so vLLM's attention should not even pass through our code.
        """
        self.forward = super().forward  # type: ignore[method-assign, assignment]

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
        **unknown: Any,
    ) -> torch.Tensor:
        """Attends; shapes and arguments are vLLM's, those of a later version included."""
        if attn_metadata is None and not self._served:
            # vLLM measures memory. Later calls without metadata only warm up.
            show_workspace(self, self._vllm_config, query.device)
        elif isinstance(attn_metadata, AfbsCUDAMetadata):
            if output_scale is None and output_block_scale is None:
                self._attend_prefills(
                    layer, query, key, value, kv_cache, attn_metadata, output, **unknown
                )
                return output
            num_long = len(attn_metadata.blocks.requests)
            fallbacks.count({"output_quantization": num_long})
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
        metadata: AfbsCUDAMetadata,
        output: torch.Tensor,
        **unknown: Any,
    ) -> None:
        """Attends in a step that has long prefills, and reports the work; see ``forward``."""
        blocks, meter = metadata.blocks, metadata.meter
        served = self._served[metadata.level]
        prefill, dense_reason = None, None
        if served.prefills:  # otherwise the builder has counted the layer's reason
            prefill, dense_reason = self._choose_prefill(served, blocks, query, kv_cache, unknown)
        started, chosen_at, attended_at = mark(), None, None
        if prefill is None:
            if dense_reason is not None:
                fallbacks.count({dense_reason: len(blocks.requests)})
            super().forward(layer, query, key, value, kv_cache, metadata, output, **unknown)
        else:
            step = step_inputs(self, layer, query, kv_cache, metadata.block_table, blocks)
            chosen = prefill.choose(step, meter.counter(served.slot))
            chosen_at = mark()
            prefill.attend(step, chosen, output)
            if metadata.dense_requests is not None:
                attended_at = mark()
                attend_dense_requests(
                    super().forward, layer, query, key, value, kv_cache,
                    metadata.dense_requests, output,
                )  # fmt: skip
        ended = mark()
        is_sampled = prefill is not None and meter.is_sampled()
        if is_sampled:
            reference = torch.empty_like(output)
            super().forward(layer, query, key, value, kv_cache, metadata, reference)
            meter.add_sample(served.slot, output, reference, blocks.requests)
        meter.add(
            LayerWork(
                slot=served.slot,
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
        """Estimates what dense attention of the long prefills would take."""
        kv_len = blocks.requests[0].geometry.kv_len
        num_scores = self.num_heads * blocks.num_scores
        return dense_seconds(self.card.name, self._kind(blocks), kv_len, num_scores)

    def _kind(self, blocks: QueryBlocks) -> LayerKind:
        """What the layer's times depend on, as in ``measured.json``."""
        variant = variant_name(self.kv_cache_dtype in FP8_DTYPES, self.sinks is not None)
        return LayerKind(self.head_size, blocks.block_q, blocks.block_k, variant)

    def _choose_prefill(
        self,
        served: ServedLayer,
        blocks: QueryBlocks,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        unknown: Mapping[str, Any],
    ) -> tuple[SparsePrefill | None, Reason | None]:
        """The fastest kernel at the expected sparsity, or why a sparse layer runs dense."""
        if unknown:
            return None, "unknown_argument"
        if not is_readable(self, kv_cache, query, blocks.block_k):
            return None, "cache_layout"
        kv_len = blocks.requests[0].geometry.kv_len
        density = 1.0 - served.plan.expected_sparsity(kv_len)
        num_scores = self.num_heads * blocks.num_visible * blocks.block_q * blocks.block_k
        kernels: tuple[KernelChoice, ...] = tuple(served.prefills)
        if not served.always_sparse:
            kernels = ("dense", *kernels)
        kind = self._kind(blocks)
        kernel = fastest_kernel(self.card.name, kind, kv_len, density, num_scores, kernels)
        return (None, "dense_is_faster") if kernel == "dense" else (served.prefills[kernel], None)
