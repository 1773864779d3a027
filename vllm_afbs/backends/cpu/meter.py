"""Metrics of what a layer does on the CPU, and what dense attention would have taken instead."""

from dataclasses import dataclass

import torch

from vllm_afbs.observability import metrics
from vllm_afbs.observability.error_sampling import is_sampled, relative_l1
from vllm_afbs.serving.batch import Step
from vllm_afbs.serving.plan import LayerPlan
from vllm_afbs.serving.settings import Settings


@dataclass(frozen=True)
class LayerWork:
    """One layer's attention in one step that has prefills. Times are of ``time.perf_counter``.

    Attributes:
        plan: The layer's.
        step: The step.
        num_kept: Kept blocks of the long prefills by head; empty if the parent did all of the step.
        started: Before selection.
        chosen: After selection.
        attended: After the long prefills or, where the parent did all of the step, after that.
        ended: After the other requests too.
    """

    plan: LayerPlan
    step: Step
    num_kept: list[int]
    started: float
    chosen: float
    attended: float
    ended: float


class DenseCost:
    """Seconds that dense attention would have taken for blocks that ran sparse.

    The machine's own dense prefills say what a block product takes. As long as it ran none that is
    comparable, the sparse ones do, by the blocks that they computed; tiles are a little slower
    than dense attention block by block (README, measured results), so the estimate is then a
    little high.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._dense_seconds, self._dense_blocks = 0.0, 0
        self._sparse_seconds, self._sparse_blocks = 0.0, 0

    def learn_dense(self, seconds: float, num_blocks: int) -> None:
        """Takes in a dense prefill of this many block products over all heads."""
        self._dense_seconds += seconds
        self._dense_blocks += num_blocks

    def learn_sparse(self, seconds: float, num_kept: int) -> None:
        """Takes in a sparse prefill that computed this many, selection left out."""
        self._sparse_seconds += seconds
        self._sparse_blocks += num_kept

    def estimate(self, num_blocks: int) -> float:
        """Seconds for this many block products; something must have been learnt."""
        if self._dense_blocks:
            return self._dense_seconds / self._dense_blocks * num_blocks
        return self._sparse_seconds / self._sparse_blocks * num_blocks


class HostMeter:
    """Counts and times the layers of one metadata builder."""

    def __init__(self, settings: Settings) -> None:
        """Takes what to measure."""
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
            # The other requests run dense either way, so their time counts on both sides.
            others_seconds = work.ended - work.attended
            metrics.DENSE_ESTIMATE_SECONDS.inc(self._cost.estimate(num_blocks) + others_seconds)
        elif not work.step.dense_indices and work.plan.dense_reason in (None, "profile_dense"):
            # Others would add time without blocks, and a layer with a window computes fewer.
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
            plan: The layer's.
            step: The step.
            output: Sparse.
            reference: Dense; overwritten.
            seconds: What dense took.
        """
        error = float(relative_l1(output, reference, step.long_prefills))
        metrics.SAMPLED_ERROR.observe(error, str(plan.layer))
        if not step.dense_indices:
            self._cost.learn_dense(seconds, len(plan.heads) * step.num_visible)
