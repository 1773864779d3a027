"""Steps that vLLM cuts into microbatches (``--enable-dbo``), cut by vLLM's own code."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from tests.profiles import uniform_profile
from vllm_afbs.serving.batch import restrict, sort_requests

PROFILE = uniform_profile()


def make_step(lengths: list[tuple[int, int]]) -> CommonAttentionMetadata:
    """A step of requests of these ``(q_len, kv_len)``."""
    q_lens, kv_lens = (torch.tensor(each, dtype=torch.int32) for each in zip(*lengths, strict=True))
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = q_lens.cumsum(0)
    num_tokens = int(starts[-1])
    table = torch.arange(len(lengths), dtype=torch.int32)[:, None].expand(-1, 64)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=kv_lens,
        seq_lens_cpu_upper_bound=kv_lens.clone(),
        num_reqs=len(lengths),
        num_actual_tokens=num_tokens,
        max_query_len=int(q_lens.max()),
        max_seq_len=int(kv_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.arange(num_tokens),
    )


def cut(lengths: list[tuple[int, int]], at: int) -> list[UBatchSlice]:
    """Two microbatches, the second one's first token being ``at``."""
    starts = [sum(q_len for q_len, _ in lengths[:n]) for n in range(len(lengths) + 1)]
    last = next(n for n in range(len(lengths)) if starts[n + 1] >= at)
    first = next(n for n in range(len(lengths)) if starts[n + 1] > at)
    return [
        UBatchSlice(slice(0, last + 1), slice(0, at)),
        UBatchSlice(slice(first, len(lengths)), slice(at, starts[-1])),
    ]


def expected_parts(lengths: list[tuple[int, int]], at: int) -> list[list[tuple[int, int, int]]]:
    """By plain counting: each half's requests, as ``(first row, q_len, kv_len)``."""
    halves: list[list[tuple[int, int, int]]] = [[], []]
    start = 0
    for q_len, kv_len in lengths:
        context = kv_len - q_len
        for half, (low, high) in enumerate(((0, at), (at, start + q_len))):
            rows = [row for row in range(start, start + q_len) if low <= row < max(high, low)]
            if rows:
                end = context + rows[-1] - start + 1
                halves[half].append((rows[0] - low, len(rows), end))
        start += q_len
    return halves


requests = st.tuples(st.integers(1, 700), st.integers(0, 8000)).map(lambda r: (r[0], r[0] + r[1]))


@given(st.lists(requests, min_size=2, max_size=5), st.data())
def test_each_half_holds_its_part_of_every_request(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    at = data.draw(st.integers(1, sum(q_len for q_len, _ in lengths) - 1))
    halves = split_attn_metadata(cut(lengths, at), make_step(lengths))
    for common, expected in zip(halves, expected_parts(lengths, at), strict=True):
        step = sort_requests(common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, PROFILE)
        found = [(r.first_row, r.geometry.q_len, r.geometry.kv_len) for r in step.long_prefills]
        may_be_sparse = [
            part for part in expected
            if part[1] >= PROFILE.block_q
            and PROFILE.min_seq_len <= part[2] <= PROFILE.max_seq_len
        ]  # fmt: skip
        assert found == may_be_sparse
        assert len(found) + len(step.dense_indices) == len(expected)
        if not step.dense_indices:
            continue
        # The dense requests' own metadata: their rows, and nobody else's pages.
        rows, dense = restrict(common, step.dense_indices)
        parts = [expected[index] for index in step.dense_indices]
        assert rows.tolist() == [row for first, n, _ in parts for row in range(first, first + n)]
        assert dense.seq_lens.tolist() == [kv_len for *_, kv_len in parts]
        assert torch.equal(dense.block_table_tensor, common.block_table_tensor[step.dense_indices])
        assert torch.equal(dense.slot_mapping, common.slot_mapping[rows])
