"""Metrics of work that the device does while the host has moved on.

The host never waits for a number: it enqueues a copy of the counters after each step's last layer,
and a thread waits for that and reports. So a step's metrics appear when the device has done it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

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
        slot: The layer's counters.
        path: ``sparse`` or ``dense``.
        num_tokens: Query tokens of the long prefills.
        num_blocks: Their block products of dense attention for one head (of QK^T, and again of PV).
        dense_seconds: Estimate of what their dense attention takes.
        started: Recorded before the layer's attention.
        chosen: Recorded between selection and attention; None where nothing was selected.
        attended: Recorded before the other requests' attention; None where it is not apart.
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
    """The device's counters after a step's last layer, on their way to the host."""

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
            plans: Of the layers, slot by slot.
            settings: What to measure.
            device: Where the layers run.
        """
        self._plans, self._settings = plans, settings
        shape = len(plans), max((len(plan.heads) for plan in plans), default=0)
        self._num_kept = torch.zeros(shape, dtype=torch.int64, device=device)
        self._errors = torch.zeros(len(plans), device=device)
        self._reported = torch.zeros(shape, dtype=torch.int64)
        self._last_slot = len(plans) - 1
        self._step: list[LayerWork] = []
        self._snapshots: SimpleQueue[_Snapshot] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def counter(self, slot: int) -> torch.Tensor:
        """The counters of a layer's kept blocks, by head, on the device."""
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
        """Notes the error of a step that was also computed dense; see ``relative_l1``."""
        self._errors[slot] = relative_l1(output, reference, requests)

    def add(self, work: LayerWork) -> None:
        """Notes a layer's work; after the last layer the step goes to the reporting thread."""
        if self._step and work.slot <= self._step[-1].slot:
            # A new step, though the last layer did not report: it is a drafter's, whose own builder
            # has it by now. That one step is lost, or its works would wait here for ever.
            self._last_slot = self._step[-1].slot
            self._step = []
            self._send()
        self._step.append(work)
        if work.slot >= self._last_slot:
            self._send()

    def _send(self) -> None:
        """Enqueues the step's report, counted from the one before."""
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
            # The other requests run dense either way, so their time counts on both sides.
            others_ms = work.attended.elapsed_time(work.ended) if work.attended is not None else 0
            metrics.DENSE_ESTIMATE_SECONDS.inc(work.dense_seconds + others_ms / 1e3)
        if work.is_sampled:
            metrics.SAMPLED_ERROR.observe(error, str(plan.layer))


def _to_host(counters: torch.Tensor) -> torch.Tensor:
    """Enqueues a copy."""
    copy = torch.empty(counters.shape, dtype=counters.dtype, pin_memory=True)
    return copy.copy_(counters, non_blocking=True)
