"""Both ways of sparse prefill on CUDA, selection included, against the fp64 reference."""

import pytest
import torch

from tests.batches import make_batch
from tests.problems import SCALE, relative_l1
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.kernels.reference import reference_attention, reference_select

LENGTHS = [(640, 640), (300, 1000), (128, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["TilePrefill", "TritonPrefill"])
@pytest.mark.parametrize("heads_outside", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("page_size", "head_dim"), [(16, 128), (128, 128), (128, 64), (64, 96)])
def test_sparse_prefill_equals_the_reference(
    page_size: int, head_dim: int, dtype: torch.dtype, heads_outside: bool, way: str
) -> None:
    from vllm_afbs.cuda import sparse

    batch = make_batch(LENGTHS, 128, page_size, head_dim, dtype, "cuda", heads_outside)
    # The copy engine fetches whole pages; what lies behind a context is masked, not skipped.
    batch.key_cache.nan_to_num_(0.0)
    batch.value_cache.nan_to_num_(0.0)
    thresholds = batch.problems[0].thresholds
    errors = []
    for chosen in (HeadThresholds(torch.ones(6), thresholds.theta), thresholds):
        on_device = HeadThresholds(chosen.tau.cuda(), chosen.theta.cuda())
        prefill = getattr(sparse, way)(sparse.Layer(on_device, SCALE, 0.0))
        step = sparse.StepInputs(
            batch.query, batch.key_cache, batch.value_cache, batch.block_table, batch.blocks
        )
        output = torch.full_like(batch.query, torch.nan)
        num_kept = torch.zeros(6, dtype=torch.int64, device="cuda")
        prefill.attend(step, prefill.choose(step, num_kept), output)
        worst, num_expected = 0.0, torch.zeros(6, dtype=torch.int64)
        for request in batch.blocks.requests:
            problem = batch.problems[request.table_row - 1]
            parts = (problem.query, problem.key, problem.value)
            keep = reference_select(*parts[:2], chosen, problem.geometry, SCALE)
            expected, _ = reference_attention(*parts, keep, problem.geometry, SCALE)
            worst = max(worst, relative_l1(output[request.rows].cpu(), expected))
            num_expected += keep.sum((1, 2))
        errors.append(worst)
        assert torch.equal(num_kept.cpu(), num_expected)
    dense_error, sparse_error = errors
    assert dense_error <= 8 * torch.finfo(dtype).eps
    # Dropping blocks must not cost precision: the same operation in the same dtype is the budget.
    assert sparse_error <= 2 * dense_error
