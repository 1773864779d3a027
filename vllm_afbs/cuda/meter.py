"""Metrics of work that the device does while the host has moved on.

The host never waits for a number: it enqueues a copy of the counters after each step's last layer,
and a thread waits for that and reports. So a step's metrics appear when the device has done it.
"""

import threading
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from vllm_afbs import metrics


@dataclass(frozen=True)
class LayerWork:
    """One layer's share of a step with long prefills.

    Attributes:
        layer: Index of the decoder layer.
        slot: The layer's counter.
        path: ``sparse`` or ``dense``.
        num_blocks: Block products of dense attention over all heads (of QK^T, and again of PV).
        started: Recorded before the layer's attention.
        chosen: Recorded between selection and attention; None where nothing was selected.
        ended: Recorded after the layer's attention.
    """

    layer: int
    slot: int
    path: str
    num_blocks: int
    started: torch.cuda.Event
    chosen: torch.cuda.Event | None
    ended: torch.cuda.Event


def mark() -> torch.cuda.Event:
    """Records a point in the device's work."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DeviceMeter:
    """Counts and times the layers of one metadata builder."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        """Makes a counter of kept blocks per layer."""
        self._num_kept = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self._reported = [0] * num_layers
        self._step: list[LayerWork] = []
        self._steps: SimpleQueue[tuple[torch.cuda.Event, torch.Tensor, list[LayerWork]]]
        self._steps = SimpleQueue()
        self._thread: threading.Thread | None = None

    def counter(self, slot: int) -> torch.Tensor:
        """The counter of a layer, one element on the device."""
        return self._num_kept[slot : slot + 1]

    def add(self, work: LayerWork) -> None:
        """Notes a layer's work; after the last layer the step goes to the reporting thread."""
        self._step.append(work)
        if work.slot < len(self._num_kept) - 1:
            return
        snapshot = torch.empty(self._num_kept.shape, dtype=torch.int64, pin_memory=True)
        snapshot.copy_(self._num_kept, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self._steps.put((copied, snapshot, self._step))
        self._step = []
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._report_forever, name="afbs-metrics", daemon=True
            )
            self._thread.start()

    def _report_forever(self) -> None:
        while True:
            copied, snapshot, works = self._steps.get()
            copied.synchronize()
            for work in works:
                self._report(work, int(snapshot[work.slot]))

    def _report(self, work: LayerWork, total_kept: int) -> None:
        num_kept = work.num_blocks
        if work.path == "sparse":
            num_kept = total_kept - self._reported[work.slot]
            self._reported[work.slot] = total_kept
        metrics.count_products(work.layer, num_kept, work.num_blocks)
        seconds = work.started.elapsed_time(work.ended) / 1e3
        metrics.PREFILL_ATTENTION_SECONDS.observe(seconds, work.path)
        if work.chosen is not None:
            metrics.SELECTOR_SECONDS.observe(work.started.elapsed_time(work.chosen) / 1e3)
