"""Sorts a step's requests into long prefills, which may run sparse, and dense requests."""

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.kernels.query_blocks import PrefillRequest, to_device
from vllm_afbs.profile.schema import Profile
from vllm_afbs.serving.reasons import Reason

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class Step:
    """One scheduler step, as attention sees it.

    Attributes:
        long_prefills: Requests that may run sparse.
        dense_indices: Indices of all other requests that have rows: prefills and decodes.
        dense_reasons: Number of dense prefills by the reason why they run dense.
        num_dense_tokens: Query tokens of the dense prefills.
        level: Place of the level that all layers serve, in the profile's levels.
    """

    long_prefills: list[PrefillRequest] = field(default_factory=list)
    dense_indices: list[int] = field(default_factory=list)
    dense_reasons: Counter[Reason] = field(default_factory=Counter)
    num_dense_tokens: int = 0
    level: int = 0

    @property
    def has_prefill(self) -> bool:
        """Whether any request computes more than one row."""
        return bool(self.long_prefills or self.dense_reasons)

    @property
    def num_prefills(self) -> int:
        """Requests that compute more than one row."""
        return len(self.long_prefills) + self.dense_reasons.total()

    @property
    def num_long_tokens(self) -> int:
        """Query tokens of the long prefills."""
        return sum(request.geometry.q_len for request in self.long_prefills)

    @property
    def num_visible(self) -> int:
        """Block products of the long prefills' dense attention for one head."""
        return sum(request.geometry.num_visible for request in self.long_prefills)


@dataclass(frozen=True)
class DenseRequests:
    """The requests of a step that vLLM's dense backend runs while the others run sparse.

    Attributes:
        rows: Indices of their rows among the step's tokens, ``[num_rows]``, int64.
        metadata: The dense backend's metadata of a step that holds only these requests.
    """

    rows: torch.Tensor
    metadata: Any


def sort_requests(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor | None,
    profile: Profile | None,
    plain_causal: bool = True,
    enabled: bool = True,
    may_have_adapter: bool = False,
    num_decode_rows: int = 1,
    level: int = 0,
) -> Step:
    """Sorts a step's requests into long prefills and dense requests.

    Args:
        query_start_loc: ``[num_reqs + 1]``, int32, on the CPU.
        seq_lens: Context lengths, ``[num_reqs]``, int32, on the CPU; None if vLLM gives none.
        profile: The served profile; None runs everything dense.
        plain_causal: Whether the step's mask is plainly causal; with any other, all runs dense.
        enabled: Whether the kill switch allows sparse attention.
        may_have_adapter: Whether a LoRA adapter is active in the step that was not validated, or it
            is not known that none is; if so, all runs dense.
        num_decode_rows: Most rows of a decode: one, plus one for each drafted token. The context
            lengths of decodes are only upper bounds.
        level: Place of the level to serve, in the profile's levels.
    """
    starts = query_start_loc.tolist()
    kv_lens = [0] * len(starts) if seq_lens is None else seq_lens.tolist()
    step_reason: Reason | None = None
    if not enabled:
        step_reason = "disabled"
    elif may_have_adapter:
        step_reason = "active_adapter"
    elif not plain_causal:
        step_reason = "attention_mask"
    elif seq_lens is None:
        step_reason = "unknown_lengths"
    step, num_dense_tokens = Step(level=level), 0
    for request, (start, stop) in enumerate(itertools.pairwise(starts)):
        kv_len = kv_lens[request]
        q_len = stop - start
        if q_len == 0:  # padding for a CUDA graph
            continue
        reason = step_reason or _dense_reason(q_len, kv_len, profile, num_decode_rows)
        if reason is None and profile is not None:
            geometry = BlockGeometry(q_len, kv_len, profile.block_q, profile.block_k)
            step.long_prefills.append(PrefillRequest(start, request, geometry))
            continue
        step.dense_indices.append(request)
        if q_len > 1 and reason is not None:
            step.dense_reasons[reason] += 1
            num_dense_tokens += q_len
    return replace(step, num_dense_tokens=num_dense_tokens)


def _dense_reason(
    q_len: int, kv_len: int, profile: Profile | None, num_decode_rows: int
) -> Reason | None:
    if profile is None:
        return "no_profile"
    # Shorter queries are decodes, speculative verifications and the ends of chunks. Each would
    # be a single tile.
    if q_len < profile.block_q or q_len <= num_decode_rows:
        return "short_query"
    if kv_len < profile.min_seq_len:
        return "short_context"
    if kv_len > profile.max_seq_len:
        return "long_context"
    return None


def restrict(
    common: "CommonAttentionMetadata", requests: list[int]
) -> tuple[torch.Tensor, "CommonAttentionMetadata"]:
    """Cuts a step's metadata down to some of its requests.

    Args:
        common: The step's metadata.
        requests: Indices of the requests to keep; at least one.

    Returns:
        The rows of these requests among the step's tokens, and the metadata of a step that holds
        only these requests.
    """
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.tolist()
    own_rows = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in requests])
    rows = to_device(own_rows, device)
    index = torch.tensor(requests)
    query_lens = common.query_start_loc_cpu.diff()[index]
    query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
    query_start_loc[1:] = query_lens.cumsum(0)
    on_device = to_device(index, device)
    known = common.seq_lens_cpu_upper_bound
    return rows, replace(
        common,
        query_start_loc=to_device(query_start_loc, device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=common.seq_lens[on_device],
        seq_lens_cpu_upper_bound=None if known is None else known[index],
        num_reqs=len(requests),
        num_actual_tokens=len(rows),
        max_query_len=int(query_lens.max()),
        max_seq_len=common.max_seq_len if known is None else int(known[index].max()),
        block_table_tensor=common.block_table_tensor[on_device],
        slot_mapping=common.slot_mapping[rows],
    )
