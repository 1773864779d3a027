"""The served selector with one tau for all heads or tuned thresholds, and variants of its scores.

Blocks are chosen by their mass, as in ``kernels.thresholds``. With one tau, the knob is tau's
depth, -log(1 - tau). With tuned thresholds, the knob is added to the depth of every head's tau, so
0 leaves them as tuned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_afbs.evaluate.methods import (
    ALWAYS,
    BLOCK,
    Layer,
    Method,
    depth,
    mass_before,
    sink,
)
from vllm_afbs.kernels import (
    MEAN_KEY_SHARE,
    THETA_OFF,
    BlockGeometry,
    HeadThresholds,
    pool_queries,
    score_blocks,
)
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving.plan import plan_layer


@dataclass(frozen=True)
class UniformTau(Method):
    """One tau for all heads, no theta.

    Attributes:
        query_rows: Rows that are pooled into one query, a divisor of ``block_q``; a block's mass is
            the mean over its queries. None pools the whole block, as served; 1 takes the softmax of
            every row.
        mean_key_share: Share of the mass that is computed from blocks' mean keys.
        local_keys: Keys before a query block's first row that are always kept; None as served.
    """

    query_rows: int | None = None
    mean_key_share: float = MEAN_KEY_SHARE
    local_keys: int | None = None

    def score(self, layer: Layer, geometry: BlockGeometry) -> torch.Tensor:
        """See ``Method``."""
        thresholds = self._thresholds(layer)
        theta = thresholds.theta[:, None]
        finer = replace(geometry, block_q=self.query_rows or geometry.block_q)
        scores = score_blocks(layer.query, layer.key, finer, layer.softmax_scale)
        self_similarity = scores.key_self_similarity.repeat_interleave(layer.group, 0)
        keys_below = (self_similarity < theta)[:, None, :]
        mass = _mean_over_queries(scores.mass(keys_below, self.mean_key_share), finer, geometry)
        base = depth(thresholds.tau)[:, None, None]
        levels = torch.where(base.isinf(), ALWAYS, depth(mass_before(mass)) - base)
        self_similarity = scores.query_self_similarity
        if finer != geometry:
            self_similarity = pool_queries(layer.query, geometry).self_similarity
        below = keys_below | (self_similarity < theta)[:, :, None]
        reach = geometry.local_keys if self.local_keys is None else self.local_keys
        local = geometry.local(reach).to(levels.device)
        return sink(levels.masked_fill_(below | local, ALWAYS))

    def _thresholds(self, layer: Layer) -> HeadThresholds:
        tau = torch.zeros(layer.query.shape[1], device=layer.query.device)
        return HeadThresholds(tau, torch.full_like(tau, THETA_OFF))


def _mean_over_queries(
    mass: torch.Tensor, finer: BlockGeometry, geometry: BlockGeometry
) -> torch.Tensor:
    """Averages over the queries of each query block, weighted by their rows."""
    if finer.block_q == geometry.block_q:
        return mass
    block_of_query = (finer.first_positions // geometry.block_q).to(mass.device)
    weighted = mass * finer.row_starts.diff().to(mass.device)[:, None]
    sums = mass.new_zeros(len(mass), geometry.num_q_blocks, mass.shape[-1])
    counts = geometry.row_starts.diff().to(mass.device)
    return sums.index_add_(1, block_of_query, weighted) / counts[:, None]


@dataclass(frozen=True)
class Tuned(UniformTau):
    """The served selector with each head's own thresholds.

    Attributes:
        thresholds: Thresholds by layer; layers left out run dense.
    """

    thresholds: Mapping[int, HeadThresholds] = field(default_factory=dict)

    def is_dense(self, layer: int, length: int) -> bool:
        """See ``Method``."""
        return layer not in self.thresholds or super().is_dense(layer, length)

    def _thresholds(self, layer: Layer) -> HeadThresholds:
        return self.thresholds[layer.index].to(layer.query.device)


def of_profile(name: str, profile: Profile, **fields: Any) -> Tuned:
    """Makes the method that a server with this profile runs; the same layers run dense.

    Args:
        name: Name in the results.
        profile: The profile.
        fields: Fields of the method that replace the profile's.
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
    "mean keys": {"mean_key_share": 1.0},
    "every key": {"mean_key_share": 0.0},
    "queries of 32 rows": {"query_rows": 32},
    "queries of 16 rows": {"query_rows": 16},
    "token Q": {"query_rows": 1},
    "1 local block": {"local_keys": 0},
    "4 local blocks": {"local_keys": 3 * BLOCK},
    "key blocks of 64": {"block_k": 64},
    "mean correction": {"corrects": True},
}
"""Selectors that are not served; each differs from the served one in one respect."""


def variants() -> Sequence[Method]:
    """Makes all variants, with one tau for all heads."""
    return [UniformTau(f"one tau, {change}", **fields) for change, fields in VARIANTS.items()]
