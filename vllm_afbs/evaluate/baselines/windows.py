"""A sliding window and the first tokens: StreamingLLM (arXiv 2309.17453)."""

from dataclasses import dataclass

import torch

from vllm_afbs.evaluate.methods import Layer, Method, sink
from vllm_afbs.kernels import BlockGeometry


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps the first block and the nearest blocks.

    The knob is the window in key blocks. As it grows, heads take in the next block one after
    another, so that any sparsity can be reached.
    """

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        num_heads = layer.query.shape[1]
        own = geometry.last_positions // geometry.block_k
        distance = own[:, None] - torch.arange(geometry.num_k_blocks)[None, :]
        # The golden ratio's multiples fill the interval evenly, however many heads there are.
        heads = layer.index * num_heads + torch.arange(num_heads)
        offset = (heads * 0.6180339887498949) % 1.0
        return sink((distance[None] + offset[:, None, None]).to(layer.query.device))
