"""The served rule with one tau for all heads or a tuned one for each, and variants of its scores.

The mass of pooled scores decides, as in ``kernels.selection``. The knob moves all heads' depth,
-log(1 - tau), alike: with one tau it is that depth, with tuned thresholds what is added to theirs,
so that 0 is as tuned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_afbs.evaluate.methods import (
    ALWAYS,
    Layer,
    Method,
    depth,
    diagonal,
    mass_before,
    sink,
)
from vllm_afbs.kernels import BlockGeometry, HeadThresholds, pool_keys, pool_queries
from vllm_afbs.kernels.selection import THETA_OFF
from vllm_afbs.profile import Profile
from vllm_afbs.serving import plan_layer


@dataclass(frozen=True)
class UniformTau(Method):
    """One tau for all heads, no theta.

    Attributes:
        token_queries: Whether every row's softmax over the pooled keys is taken and averaged,
            instead of the softmax of the averaged row.
        local_blocks: So many query blocks' worth of keys up to the diagonal are always kept.
        sink_apart: Whether mass is counted without the first block's, which is kept in any case:
            what heads put there, with values near zero, says nothing of what they would lose.
    """

    token_queries: bool = False
    local_blocks: int = 1
    sink_apart: bool = False

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        thresholds = self._thresholds(layer)
        theta = thresholds.theta[:, None]
        queries, keys = pool_queries(layer.query, geometry), pool_keys(layer.key, geometry)
        means = keys.mean.repeat_interleave(layer.group, 0)
        unlike = (keys.similarity.repeat_interleave(layer.group, 0) < theta)[:, None, :]
        hidden = unlike | ~geometry.visible.to(means.device)
        if self.sink_apart:
            hidden[..., 0] = True
        if self.token_queries:
            mass = _token_mass(layer, means, hidden, geometry)
        else:
            scores = (queries.mean @ means.transpose(1, 2)) * layer.softmax_scale
            # A row may have no pooled key left (all unlike): its mass is then zero, not NaN.
            mass = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1).nan_to_num_(0.0)
        base = depth(thresholds.tau)[:, None, None]
        levels = torch.where(base.isinf(), ALWAYS, depth(mass_before(mass)) - base)
        guarded = unlike | (queries.similarity < theta)[:, :, None]
        local = diagonal(geometry, self.local_blocks).to(levels.device)
        return sink(levels.masked_fill_(guarded | local, ALWAYS))

    def _thresholds(self, layer: Layer) -> HeadThresholds:
        tau = torch.zeros(layer.query.shape[1], device=layer.query.device)
        return HeadThresholds(tau, torch.full_like(tau, THETA_OFF))


def _token_mass(
    layer: Layer, means: torch.Tensor, hidden: torch.Tensor, geometry: BlockGeometry
) -> torch.Tensor:
    """Mean over the block's rows of each row's softmax over the blocks' mean keys."""
    scores = layer.head_queries() @ means.transpose(1, 2)
    block_of_row = torch.arange(scores.shape[1], device=scores.device) // geometry.block_q
    by_block = hidden.expand(len(scores), geometry.num_q_blocks, -1)
    scores.masked_fill_(by_block[:, block_of_row], -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num_(0.0)
    mass = weights.new_zeros(len(weights), geometry.num_q_blocks, weights.shape[-1])
    rows = geometry.row_starts.diff().to(mass.device)
    return mass.index_add_(1, block_of_row, weights) / rows[:, None]


@dataclass(frozen=True)
class Tuned(UniformTau):
    """Thresholds of each head.

    Attributes:
        thresholds: By layer; those left out run dense.
    """

    thresholds: Mapping[int, HeadThresholds] = field(default_factory=dict)

    def is_dense(self, layer: int, length: int) -> bool:
        """See ``Method``."""
        return layer not in self.thresholds or super().is_dense(layer, length)

    def _thresholds(self, layer: Layer) -> HeadThresholds:
        return self.thresholds[layer.index].to(layer.query.device)


def of_profile(name: str, profile: Profile, **fields: Any) -> Tuned:
    """What the server does with a profile, layers that it leaves dense included.

    Args:
        name: What results call it.
        profile: The profile.
        fields: Fields of the method to set otherwise.
    """
    num_heads = profile.model.num_heads
    plans = [plan_layer(profile, i, num_heads, 0, None) for i in range(profile.model.num_layers)]
    values: dict[str, Any] = {
        "block_q": profile.block_q,
        "block_k": profile.block_k,
        "given": 0.0,
        "min_length": profile.min_seq_len,
        "max_length": profile.max_seq_len,
    }
    thresholds = {p.layer: p.thresholds for p in plans if p.thresholds is not None}
    return Tuned(name, thresholds=thresholds, **(values | fields))


VARIANTS: dict[str, dict[str, Any]] = {
    "token Q": {"token_queries": True},
    "2 local blocks": {"local_blocks": 2},
    "4 local blocks": {"local_blocks": 4},
    "key blocks of 64": {"block_k": 64},
    "mean correction": {"corrects": True},
    "sink apart": {"sink_apart": True},
    "sink apart, 2 local blocks": {"sink_apart": True, "local_blocks": 2},
    "sink apart, 4 local blocks": {"sink_apart": True, "local_blocks": 4},
    "token Q, sink apart": {"token_queries": True, "sink_apart": True},
    "token Q, sink apart, 2 local blocks": {
        "token_queries": True,
        "sink_apart": True,
        "local_blocks": 2,
    },
    "token Q, sink apart, 4 local blocks": {
        "token_queries": True,
        "sink_apart": True,
        "local_blocks": 4,
    },
    "token Q, sink apart, mean correction": {
        "token_queries": True,
        "sink_apart": True,
        "corrects": True,
    },
}
"""Selectors that are not served, each one change away from the served one."""


def variants() -> Sequence[Method]:
    """Those, with one tau for all heads."""
    return [UniformTau(f"one tau, {change}", **fields) for change, fields in VARIANTS.items()]
