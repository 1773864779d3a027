"""The evaluator against the fp64 specification."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_afbs.captures import LayerTensors
from vllm_afbs.kernels import THETA_OFF, BlockGeometry, HeadThresholds
from vllm_afbs.kernels.reference import reference_attention, reference_select
from vllm_afbs.tuning.search.evaluator import LayerEvaluator


def random_layer(
    length: int, num_kv_heads: int, group: int, head_dim: int, seed: int, spread: float = 1.0
) -> LayerTensors:
    generator = torch.Generator().manual_seed(seed)

    def rows(heads: int, scale: float) -> torch.Tensor:
        # A common offset gives blocks self-similarities away from zero, as real keys have.
        offset = torch.randn(1, heads, head_dim, generator=generator)
        noise = torch.randn(length, heads, head_dim, generator=generator)
        return (scale * (noise + offset)).bfloat16()

    return LayerTensors(
        rows(num_kv_heads * group, spread),
        rows(num_kv_heads, spread),
        rows(num_kv_heads, 1.0),
        head_dim**-0.5,
    )


def specified_scores(
    layer: LayerTensors, length: int, block_q: int, block_k: int, thresholds: HeadThresholds
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sparse and dense output, and each head's relative L1 error and sparsity, all in fp64."""
    query, key, value = (t[:length] for t in (layer.query, layer.key, layer.value))
    geometry = BlockGeometry(length, length, block_q, block_k)
    keep = reference_select(query, key, thresholds, geometry, layer.softmax_scale)
    everything = geometry.visible.expand_as(keep)
    sparse, dense = (
        reference_attention(
            query, key, value, blocks, geometry, layer.softmax_scale,
            softcap=layer.softcap, sinks=layer.sink,
        )[0]
        for blocks in (keep, everything)
    )  # fmt: skip
    error = (sparse - dense).abs().sum((0, 2)) / dense.abs().sum((0, 2))
    sparsity = 1 - keep.sum((1, 2)).double() / geometry.num_visible
    return sparse, dense, error, sparsity


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(5, 90),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 16]),
    block_q=st.sampled_from([4, 8, 16]),
    block_k=st.sampled_from([4, 8, 16]),
    tau=st.floats(0.05, 1.0),
    theta=st.floats(-1.0, 0.9),
    spread=st.floats(0.1, 3.0),
    sink=st.none() | st.floats(-10.0, 10.0),
    softcap=st.sampled_from([0.0, 2.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_error_and_sparsity_are_the_specifications(
    length: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_q: int,
    block_k: int,
    tau: float,
    theta: float,
    spread: float,
    sink: float | None,
    softcap: float,
    seed: int,
) -> None:
    num_heads = num_kv_heads * group
    layer = random_layer(length + 7, num_kv_heads, group, head_dim, seed, spread)
    sinks = None if sink is None else sink + torch.linspace(-1.0, 1.0, num_heads)
    layer = replace(layer, sink=sinks, softcap=softcap)
    thresholds = HeadThresholds(
        torch.full((num_heads,), tau), torch.linspace(THETA_OFF, theta, num_heads)
    )
    scores = LayerEvaluator(layer, length, block_q, block_k).score(thresholds)
    _, _, error, sparsity = specified_scores(layer, length, block_q, block_k, thresholds)
    # A pooled mass within fp32 rounding of tau may choose one block more or less; equal sparsity
    # of every head says that it did not happen, and it must not in more than the odd example.
    torch.testing.assert_close(scores.sparsity, sparsity, atol=1e-9, rtol=0)
    # The error is a difference of fp32 outputs of order 1: absolute, not relative, to rounding.
    torch.testing.assert_close(scores.error, error, atol=2e-5, rtol=1e-4)


def test_a_share_of_the_rows_is_scored_on_those_rows_alone() -> None:
    layer = random_layer(128, 1, 2, 16, seed=3)
    thresholds = HeadThresholds(torch.full((2,), 0.5), torch.full((2,), THETA_OFF))
    evaluator = LayerEvaluator(layer, 128, 16, 16, row_share=0.5)
    assert evaluator.sampled_blocks == [1, 3, 5, 7]
    assert evaluator.row_share == 0.5
    scores = evaluator.score(thresholds)
    sparse, dense, _, sparsity = specified_scores(layer, 128, 16, 16, thresholds)
    rows = torch.cat([torch.arange(16 * i, 16 * i + 16) for i in (1, 3, 5, 7)])
    error = (sparse - dense)[rows].abs().sum((0, 2)) / dense[rows].abs().sum((0, 2))
    torch.testing.assert_close(scores.error, error, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(scores.sparsity, sparsity, atol=1e-9, rtol=0)


@settings(max_examples=25, deadline=None)
@given(tau=st.floats(0.05, 1.0), theta=st.floats(-1.0, 0.9), seed=st.integers(0, 1000))
def test_sparsity_needs_no_attention_and_falls_with_tau(
    tau: float, theta: float, seed: int
) -> None:
    evaluator = LayerEvaluator(random_layer(90, 2, 2, 16, seed), 90, 16, 16, row_share=0.5)
    thetas = torch.full((4,), theta)
    thresholds = HeadThresholds(torch.full((4,), tau), thetas)
    sparsity = evaluator.sparsity(thresholds)
    assert torch.equal(sparsity, evaluator.score(thresholds).sparsity)
    most = evaluator.sparsity(HeadThresholds(torch.full((4,), 0.05), thetas))
    assert (most >= sparsity).all()


def test_partials_that_do_not_fit_are_recomputed_to_the_same_scores() -> None:
    layer = random_layer(100, 2, 2, 16, seed=4)
    thresholds = HeadThresholds(torch.full((4,), 0.6), torch.full((4,), 0.3))
    kept = LayerEvaluator(layer, 100, 16, 16).score(thresholds)
    streamed = LayerEvaluator(layer, 100, 16, 16, cache_bytes=0).score(thresholds)
    assert torch.equal(kept.error, streamed.error)
    assert torch.equal(kept.sparsity, streamed.sparsity)


def test_a_sink_that_takes_most_of_the_softmax_hides_what_is_dropped() -> None:
    """Dense and sparse outputs shrink by shares of their own, and their difference with them."""
    layer = random_layer(256, 1, 2, 16, seed=8)
    thresholds = HeadThresholds(torch.full((2,), 0.3), torch.full((2,), THETA_OFF))
    plain = LayerEvaluator(layer, 256, 16, 16).score(thresholds)
    # The first head's sink counts for nothing, the second's for nearly all.
    with_sinks = replace(layer, sink=torch.tensor([-60.0, 20.0]))
    scores = LayerEvaluator(with_sinks, 256, 16, 16).score(thresholds)
    assert torch.equal(scores.sparsity, plain.sparsity)
    torch.testing.assert_close(scores.error[0], plain.error[0])
    _, _, error, _ = specified_scores(with_sinks, 256, 16, 16, thresholds)
    assert abs(float(error[1] - plain.error[1])) > 0.01
    torch.testing.assert_close(scores.error, error, atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_bytes", [None, 0])
def test_a_gpu_scores_as_the_host_does(cache_bytes: int | None) -> None:
    layer = replace(random_layer(900, 2, 3, 64, seed=7), sink=torch.linspace(-4, 8, 6), softcap=9.0)
    thresholds = HeadThresholds(torch.full((6,), 0.6), torch.full((6,), 0.3))
    there = LayerEvaluator(layer.to(torch.device("cuda")), 900, 128, 64, 0.5, cache_bytes)
    here = LayerEvaluator(layer, 900, 128, 64, 0.5)
    torch.testing.assert_close(there.theta_at(0.2), here.theta_at(0.2))
    scores, expected = there.score(thresholds), here.score(thresholds)
    assert scores.error.device.type == "cpu"
    torch.testing.assert_close(scores.error, expected.error, atol=0, rtol=1e-4)
    torch.testing.assert_close(scores.sparsity, expected.sparsity)
    torch.testing.assert_close(there.sparsity(thresholds), expected.sparsity)


def test_dropping_the_block_with_nearly_all_the_mass_is_still_exact() -> None:
    """Scores 200 apart underflow fp32 against the row's maximum, not against the kept one's."""
    layer = random_layer(64, 1, 1, 16, seed=5)
    direction = torch.zeros(16)
    direction[0] = 40.0
    signs = torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    key, query = layer.key.clone(), layer.query.clone()
    key[16:32, 0] = signs[:16] * direction
    query[:, 0, 0] = signs[:, 0] * 20.0
    layer = LayerTensors(query, key.bfloat16(), layer.value, layer.softmax_scale)
    # Block 1's keys cancel in the mean and so do the queries, so the selector cannot see the mass
    # that they hold, and the last quarter of the rows is far enough away to lose it.
    thresholds = HeadThresholds(torch.tensor([0.05]), torch.tensor([THETA_OFF]))
    scores = LayerEvaluator(layer, 64, 16, 16).score(thresholds)
    _, _, error, sparsity = specified_scores(layer, 64, 16, 16, thresholds)
    assert float(sparsity) > 0
    assert float(error) > 0.2
    torch.testing.assert_close(scores.error, error, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("quantile", [0.1, 0.3])
def test_a_quantile_of_each_heads_blocks_is_below_its_theta(quantile: float) -> None:
    evaluator = LayerEvaluator(random_layer(640, 2, 2, 16, seed=6), 640, 16, 16)
    theta = evaluator.theta_at(quantile)
    layer = random_layer(640, 2, 2, 16, seed=6)
    for head in range(4):
        blocks = [
            *layer.query[:, head].double().split(16),
            *layer.key[:, head // 2].double().split(16),
        ]
        unit = [rows / rows.norm(dim=-1, keepdim=True) for rows in blocks]
        below = sum(float((rows @ rows.T).mean()) < float(theta[head]) for rows in unit)
        assert abs(below - quantile * len(blocks)) <= 1
    assert evaluator.theta_at(0.0).tolist() == [THETA_OFF] * 4
