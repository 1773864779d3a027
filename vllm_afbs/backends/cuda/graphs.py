"""Keeps vLLM from capturing steps that hold prefills into CUDA graphs.

A captured graph replays the kernels that ran while it was captured, and these are dense: capture
happens before there is any prompt to select blocks of. FlashAttention 3 says ``ALWAYS``, that its
kernels may be captured for any batch. With ``cudagraph_mode=FULL``, vLLM then replays a prefill
that fits into a captured size as it replays decodes, and our code does not run: neither selection
nor counting. With ``UNIFORM_BATCH`` vLLM lowers ``FULL`` to its default, ``FULL_AND_PIECEWISE``
(or ``FULL_DECODE_ONLY`` if attention is not split from the compiled graph): decodes and verified
drafts still replay a full graph, and all other steps call attention.
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from vllm_afbs.serving import admission, configuration

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class CapturesDecodesOnly(FlashAttentionMetadataBuilder):
    """FlashAttention's builder, which lets vLLM capture only decodes if a profile is served.

    Without a profile nothing of ours runs, so there FlashAttention's own answer stands.
    """

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: "VllmConfig", kv_cache_spec: Any
    ) -> AttentionCGSupport:
        """Which batches vLLM may capture; arguments are vLLM's."""
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if admission.admitted_profile(vllm_config) is None:
            return stock
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    @classmethod
    def get_varlen_cudagraph_max_query_len(
        cls, vllm_config: "VllmConfig", kv_cache_spec: Any
    ) -> int | None:
        """The most rows of a decode in a captured batch of decodes of different lengths.

        vLLM asks this of builders that do not say ``ALWAYS``. It never replays such a graph for a
        batch that holds a prefill, so our lower answer above must not forbid it.
        """
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if stock is AttentionCGSupport.ALWAYS:
            return configuration.num_decode_rows(vllm_config)
        bound: int | None = super().get_varlen_cudagraph_max_query_len(vllm_config, kv_cache_spec)
        return bound
