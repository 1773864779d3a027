"""SpargeAttn as published (arXiv 2502.18137, section 3), with the defaults of its code."""

from dataclasses import dataclass

import torch

from vllm_afbs.evaluate.methods import ALWAYS, Layer, Method, depth, sink
from vllm_afbs.kernels import BlockGeometry, pool_keys, pool_queries

SIMTHRESHD1 = 0.6
CDFTHRESHD = 0.98
"""Defaults of ``spas_sage2_attn_meansim_cuda``; its third threshold skips nothing that counts."""


@dataclass(frozen=True)
class SpargeAttn(Method):
    """Pooled scores of smoothed keys; blocks of unlike rows are always computed.

    Unlike the served rule, keys are pooled after subtracting their mean (which changes which
    blocks count as alike), the block that crosses the threshold is left out, and no sink is kept
    unless asked for.
    The knob is the depth of ``cdfthreshd``; ``simthreshd1`` stays at its default.

    Attributes:
        attention_sink: Its option of that name: whether the first block is always computed.
    """

    block_k: int = 64
    attention_sink: bool = False

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        queries = pool_queries(layer.query.float(), geometry)
        smooth = layer.key.float() - layer.key.float().mean(0)
        keys = pool_keys(smooth, geometry)
        means = keys.mean.repeat_interleave(layer.group, 0)
        unlike = (keys.self_similarity.repeat_interleave(layer.group, 0) <= SIMTHRESHD1)[:, None, :]
        hidden = ~geometry.visible.to(means.device)
        scores = queries.mean @ means.transpose(1, 2) * layer.softmax_scale
        mass = torch.softmax(scores.masked_fill(unlike | hidden, -torch.inf), -1).nan_to_num_(0.0)
        ordered, order = mass.sort(dim=-1, descending=True, stable=True)
        # The crossing block joins late: what counts is the mass up to and with it.
        reached = depth(torch.zeros_like(mass).scatter_(-1, order, ordered.cumsum(-1)))
        reached.scatter_(-1, order[..., :1], ALWAYS)
        guarded = unlike | (queries.self_similarity <= SIMTHRESHD1)[:, :, None]
        levels = reached.masked_fill(guarded, ALWAYS)
        return sink(levels) if self.attention_sink else levels
