"""Reports what layers do on the CPU, and how long dense attention would have taken instead."""

from dataclasses import dataclass

import torch

from vllm_afbs.observability import metrics
from vllm_afbs.observability.error_sampling import is_sampled, relative_l1
from vllm_afbs.serving.batch import Step
from vllm_afbs.serving.plan import LayerPlan
from vllm_afbs.serving.settings import Settings


@dataclass(frozen=True)
class LayerWork:
    """One layer's attention in one step that has prefills. Times are ``time.perf_counter`` seconds.

    Attributes:
        plan: What the layer serves.
        step: The step.
        num_kept: Number of kept blocks of the long prefills by head; empty if vLLM's dense backend
            ran the whole step.
        started: Before selection.
        chosen: After selection.
        attended: After the attention of the long prefills, or of the whole step if it ran dense.
        ended: After the attention of the dense requests.
    """

    plan: LayerPlan
    step: Step
    num_kept: list[int]
    started: float
    chosen: float
    attended: float
    ended: float


class DenseCost:
    """Estimates how long dense attention would have taken for blocks that ran sparse.

    Dense prefills on this machine show how long a block product takes. Until there is a comparable
    one, sparse prefills do, by the number of blocks that they computed. Per block, tiles are a
    little slower than dense attention (docs/benchmarks.md), so the estimate is then a little too
    high.
    """

    def __init__(self) -> None:
        """Starts without any measurement."""
        self._dense_seconds, self._dense_blocks = 0.0, 0
        self._sparse_seconds, self._sparse_blocks = 0.0, 0

    def learn_dense(self, seconds: float, num_blocks: int) -> None:
        """Adds a dense prefill with this number of block products over all heads."""
        self._dense_seconds += seconds
        self._dense_blocks += num_blocks

    def learn_sparse(self, seconds: float, num_kept: int) -> None:
        """Adds a sparse prefill that computed this number of blocks; its selection is not timed."""
        self._sparse_seconds += seconds
        self._sparse_blocks += num_kept

    def estimate(self, num_blocks: int) -> float:
        """Seconds for this number of block products. Something must have been added before."""
        if self._dense_blocks:
            return self._dense_seconds / self._dense_blocks * num_blocks
        return self._sparse_seconds / self._sparse_blocks * num_blocks


class HostMeter:
    """Counts and times the layers of one metadata builder."""

    def __init__(self, settings: Settings) -> None:
        """Makes a meter.

        Args:
            settings: What to measure.
        """
        self._settings = settings
        self._cost = DenseCost()

    def add(self, work: LayerWork) -> None:
        """Reports a layer's work."""
        path = "sparse" if work.num_kept else "dense"
        step, plan = work.step, work.plan
        metrics.count_tokens("dense", step.num_dense_tokens)
        metrics.count_tokens(path, step.num_long_tokens)
        metrics.PREFILL_ATTENTION_SECONDS.observe(work.ended - work.started, path)
        if not step.long_prefills:
            return
        if plan.thresholds is not None:
            metrics.SELECTOR_SECONDS.observe(work.chosen - work.started)
        num_blocks = step.num_visible
        num_kept = work.num_kept or [num_blocks] * len(plan.heads)
        heads = plan.heads if self._settings.per_head_metrics else None
        metrics.count_products(plan.layer, num_kept, num_blocks, heads)
        self._add_estimate(work, sum(num_kept), len(plan.heads) * num_blocks)

    def _add_estimate(self, work: LayerWork, num_kept: int, num_blocks: int) -> None:
        seconds = work.attended - work.chosen
        if work.num_kept:
            self._cost.learn_sparse(seconds, num_kept)
            # Dense requests take the same time either way, so it is part of the estimate too.
            requests_seconds = work.ended - work.attended
            metrics.DENSE_ESTIMATE_SECONDS.inc(self._cost.estimate(num_blocks) + requests_seconds)
        elif not work.step.dense_indices and work.plan.dense_reason in (None, "profile_dense"):
            # Dense requests would add time but no blocks; other layers may not be plain attention.
            self._cost.learn_dense(seconds, num_blocks)

    def is_sampled(self) -> bool:
        """Whether to compare this sparse step with dense attention."""
        return is_sampled(self._settings.sample_rate)

    def add_sample(
        self,
        plan: LayerPlan,
        step: Step,
        output: torch.Tensor,
        reference: torch.Tensor,
        seconds: float,
    ) -> None:
        """Reports the error of a step that was also computed dense; see ``relative_l1``.

        Args:
            plan: What the layer serves.
            step: The step.
            output: The sparse output.
            reference: The dense output; it is overwritten.
            seconds: How long the dense attention took.
        """
        error = float(relative_l1(output, reference, step.long_prefills))
        metrics.SAMPLED_ERROR.observe(error, str(plan.layer))
        if not step.dense_indices:
            self._cost.learn_dense(seconds, len(plan.heads) * step.num_visible)
