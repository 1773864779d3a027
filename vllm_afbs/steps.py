"""Which requests of a step are long prefills, and why the others are not."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from vllm_afbs.kernels import BlockGeometry
from vllm_afbs.profile import Profile


@dataclass(frozen=True)
class LongPrefill:
    """A request whose rows of this step may run sparse.

    Attributes:
        rows: Its rows among the step's tokens.
        geometry: Its blocks.
        pages: Its row of the block table.
    """

    rows: slice
    geometry: BlockGeometry
    pages: torch.Tensor


@dataclass(frozen=True)
class Step:
    """One scheduler step, as attention sees it.

    Attributes:
        long_prefills: Requests that may run sparse.
        others: Indices of all other requests.
        dense_reasons: How many prefills among the others have each reason to run dense.
    """

    long_prefills: list[LongPrefill] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    dense_reasons: Counter[str] = field(default_factory=Counter)

    @property
    def has_prefill(self) -> bool:
        """Whether any request computes more than one row."""
        return bool(self.long_prefills or self.dense_reasons)


def sort_requests(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    profile: Profile | None,
) -> Step:
    """Tells long prefills from everything else.

    Args:
        query_start_loc: ``[num_reqs + 1]``, int32, on the CPU.
        seq_lens: Context lengths, ``[num_reqs]``, int32, on the CPU.
        block_table: ``[num_reqs, max_pages]``, int32.
        profile: The served profile; without one nothing runs sparse.
    """
    starts = query_start_loc.tolist()
    step = Step()
    for request, kv_len in enumerate(seq_lens.tolist()):
        start, stop = starts[request : request + 2]
        q_len = stop - start
        reason = _dense_reason(q_len, kv_len, profile)
        if profile is not None and reason is None:
            geometry = BlockGeometry(q_len, kv_len, profile.block_q, profile.block_k)
            step.long_prefills.append(
                LongPrefill(slice(start, stop), geometry, block_table[request])
            )
            continue
        step.others.append(request)
        if q_len > 1:
            step.dense_reasons[str(reason)] += 1
    return step


def _dense_reason(q_len: int, kv_len: int, profile: Profile | None) -> str | None:
    if profile is None:
        return "no_profile"
    # Shorter ones are decodes, speculative verifications and chunks' ends: a tile each.
    if q_len < profile.block_q:
        return "short_query"
    if kv_len < profile.min_seq_len:
        return "short_context"
    if kv_len > profile.max_seq_len:
        return "long_context"
    return None
