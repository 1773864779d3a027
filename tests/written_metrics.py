"""What servers that have ended wrote into a named directory."""

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_afbs.observability.status import Counters


def counters_in(directory: Path) -> Counters:
    """The numbers of all servers that wrote there, read by prometheus-client alone."""
    collector = MultiProcessCollector(CollectorRegistry(), path=str(directory))  # type: ignore[no-untyped-call]
    return Counters(collector.collect())
