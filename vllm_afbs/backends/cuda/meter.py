"""Reports what layers do on the device, without making the host wait for it.

After a step's last layer, the host enqueues a copy of the device's counters. A thread waits for
that copy and reports it, so a step's metrics appear once the device has finished the step.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue

import torch

from vllm_afbs.kernels.query_blocks import PrefillRequest
from vllm_afbs.observability import metrics
from vllm_afbs.observability.error_sampling import is_sampled, relative_l1
from vllm_afbs.serving.plan import LayerPlan
from vllm_afbs.serving.settings import Settings


@dataclass(frozen=True)
class LayerWork:
    """One layer's share of a step with long prefills.

    Attributes:
        slot: The index of the layer's counters.
        path: ``sparse`` or ``dense``.
        num_tokens: Query tokens of the long prefills.
        num_blocks: Number of their blocks in dense attention for one head. Each has a product QK^T
            and a product PV.
        dense_seconds: Estimated duration of their dense attention.
        started: Recorded before the layer's attention.
        chosen: Recorded between selection and attention; None if nothing was selected.
        attended: Recorded before the attention of the dense requests; None if there was none apart.
        ended: Recorded after the layer's attention.
        is_sampled: Whether the step was also computed dense; see ``DeviceMeter.add_sample``.
    """

    slot: int
    path: str
    num_tokens: int
    num_blocks: int
    dense_seconds: float
    started: torch.cuda.Event
    chosen: torch.cuda.Event | None
    attended: torch.cuda.Event | None
    ended: torch.cuda.Event
    is_sampled: bool


@dataclass(frozen=True)
class _Snapshot:
    """The device's counters after a step's last layer, while they are copied to the host."""

    copied: torch.cuda.Event
    num_kept: torch.Tensor
    errors: torch.Tensor
    works: list[LayerWork]


def mark() -> torch.cuda.Event:
    """Records a point in the device's work."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DeviceMeter:
    """Counts and times the layers of one metadata builder."""

    def __init__(
        self, plans: Sequence[LayerPlan], settings: Settings, device: torch.device
    ) -> None:
        """Makes the counters.

        Args:
            plans: What each layer serves, by slot.
            settings: What to measure.
            device: The device that the layers run on.
        """
        self._plans, self._settings = plans, settings
        shape = len(plans), max((len(plan.heads) for plan in plans), default=0)
        self._num_kept = torch.zeros(shape, dtype=torch.int64, device=device)
        self._errors = torch.zeros(len(plans), device=device)
        self._reported = torch.zeros(shape, dtype=torch.int64)
        self._last_slot = len(plans) - 1
        self._step: list[LayerWork] = []
        self._snapshots: Queue[_Snapshot] = Queue()
        self._thread: threading.Thread | None = None

    def counter(self, slot: int) -> torch.Tensor:
        """The device's counters of a layer's kept blocks, by head."""
        return self._num_kept[slot]

    def is_sampled(self) -> bool:
        """Whether to compare this layer's sparse step with dense attention."""
        return is_sampled(self._settings.sample_rate)

    def add_sample(
        self,
        slot: int,
        output: torch.Tensor,
        reference: torch.Tensor,
        requests: Sequence[PrefillRequest],
    ) -> None:
        """Records the error of a step that was also computed dense; see ``relative_l1``."""
        self._errors[slot] = relative_l1(output, reference, requests)

    def add(self, work: LayerWork) -> None:
        """Records a layer's work. After the last layer, hands the step to the reporting thread."""
        if self._step and work.slot <= self._step[-1].slot:
            # A new step has begun, but the last layer did not report: it belongs to a drafter, and
            # the drafter's own builder gave it another meter. From now on, the layer before it is
            # the last one. This one step is not reported, and the next report starts from here.
            self._last_slot = self._step[-1].slot
            self._step = []
            self._send()
        self._step.append(work)
        if work.slot >= self._last_slot:
            self._send()

    def _send(self) -> None:
        """Enqueues the report of the step."""
        num_kept, errors = _to_host(self._num_kept), _to_host(self._errors)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._snapshots.put(_Snapshot(copied, num_kept, errors, self._step))
        self._step = []
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._report_forever, name="afbs-metrics", daemon=True
            )
            self._thread.start()

    def _report_forever(self) -> None:
        while True:
            snapshot = self._snapshots.get()
            snapshot.copied.synchronize()
            num_kept = snapshot.num_kept - self._reported
            self._reported = snapshot.num_kept
            for work in snapshot.works:
                self._report(work, num_kept[work.slot].tolist(), float(snapshot.errors[work.slot]))
            self._snapshots.task_done()

    def finish(self) -> None:
        """Waits until all steps that were handed over are reported."""
        self._snapshots.join()

    def _report(self, work: LayerWork, num_kept: list[int], error: float) -> None:
        plan = self._plans[work.slot]
        seconds = work.started.elapsed_time(work.ended) / 1e3
        metrics.PREFILL_ATTENTION_SECONDS.observe(seconds, work.path)
        metrics.count_tokens(work.path, work.num_tokens)
        num_kept = num_kept[: len(plan.heads)]
        if work.path == "dense":
            num_kept = [work.num_blocks] * len(plan.heads)
        heads = plan.heads if self._settings.per_head_metrics else None
        metrics.count_products(plan.layer, num_kept, work.num_blocks, heads)
        if work.chosen is not None:
            metrics.SELECTOR_SECONDS.observe(work.started.elapsed_time(work.chosen) / 1e3)
        if work.path == "sparse":
            # Dense requests take the same time either way, so it is part of the estimate too.
            dense_requests_ms = (
                work.attended.elapsed_time(work.ended) if work.attended is not None else 0
            )
            metrics.DENSE_ESTIMATE_SECONDS.inc(work.dense_seconds + dense_requests_ms / 1e3)
        if work.is_sampled:
            metrics.SAMPLED_ERROR.observe(error, str(plan.layer))


def _to_host(counters: torch.Tensor) -> torch.Tensor:
    """Enqueues a copy to pinned memory, and returns the copy."""
    copy = torch.empty(counters.shape, dtype=counters.dtype, pin_memory=True)
    return copy.copy_(counters, non_blocking=True)
