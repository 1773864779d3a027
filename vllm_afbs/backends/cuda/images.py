"""The attention backend on CUDA for models whose image tokens see later tokens of their image.

vLLM composes it of two: steps that compute such an image run in vLLM's Triton backend, which has
masks for images, and all other steps run in ours. Both read and write the same cache. vLLM serves
these models in this way itself, with FlashAttention in our place.

Only for versions in which ``compat.composites`` finds something.
"""

from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionMetadata,
)

from vllm_afbs import compat
from vllm_afbs.backends.cuda.backend import AfbsCUDABackend

_composites = compat.composites()
_Composite: Any = _composites.create_composite_attention_backend(
    TritonAttentionBackend,
    AfbsCUDABackend,
    name="ImagesOrCausal",
    backend_name=compat.BACKEND_NAME,
    module=__name__,
    routing_policy=_composites.MMPrefixAttentionRouting,
)


class AfbsImagesImpl(_Composite.get_impl_cls()):  # type: ignore[misc]
    """One layer's attention: vLLM's Triton attention and ours."""

    def get_impl_for_metadata(self, attn_metadata: Any) -> Any:
        """The one that made a step's metadata; ours if there is none.

        vLLM measures memory without metadata, and ours takes more than Triton's.
        """
        if attn_metadata is None:
            return self.causal_impl
        return super().get_impl_for_metadata(attn_metadata)


class AfbsImagesMetadataBuilder(_Composite.get_builder_cls()):  # type: ignore[misc]
    """Builds the metadata of each step with the builder of the backend that runs it."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Builds a step's metadata; arguments are vLLM's."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if isinstance(metadata, TritonAttentionMetadata):
            self.causal_builder.count_masked_step(common_attn_metadata)
        return metadata


class AfbsImagesBackend(_Composite):  # type: ignore[misc]
    """Sparse prefill in steps without images, and vLLM's Triton attention in steps with them."""

    @staticmethod
    def get_impl_cls() -> type[AfbsImagesImpl]:
        """The layer's implementation."""
        return AfbsImagesImpl

    @staticmethod
    def get_builder_cls() -> type[AfbsImagesMetadataBuilder]:
        """The builder of a step's metadata."""
        return AfbsImagesMetadataBuilder

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The page size if the user gives none: the one of our backend alone."""
        return AfbsCUDABackend.get_preferred_block_size(default_block_size)
