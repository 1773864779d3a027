"""A server's ``/metrics`` with the metrics added that it does not have yet.

To go when the server has them: the test then gives Prometheus the server's own URL.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm_afbs.demo.server import HOST

REGISTRY = CollectorRegistry()
HEAD_PRODUCTS = Counter(
    "vllm_afbs_head_block_products", "", ["layer", "head", "outcome"], registry=REGISTRY
)
TOKENS = Counter("vllm_afbs_prefill_tokens", "", ["path"], registry=REGISTRY)
DENSE_ESTIMATE = Counter("vllm_afbs_dense_estimate_seconds", "", registry=REGISTRY)
SAMPLED_ERROR = Histogram("vllm_afbs_sampled_error", "", ["layer"], registry=REGISTRY)
ENABLED = Gauge("vllm_afbs_enabled", "", registry=REGISTRY)


def _work() -> None:
    for outcome, products in (("computed", 30), ("skipped", 70)):
        HEAD_PRODUCTS.labels("0", "0", outcome).inc(products)
    for path, tokens in (("sparse", 90), ("dense", 10)):
        TOKENS.labels(path).inc(tokens)
    DENSE_ESTIMATE.inc(0.5)
    SAMPLED_ERROR.labels("0").observe(0.03)
    ENABLED.set(1)


@contextmanager
def with_coming_metrics(server_url: str) -> Iterator[str]:
    """Yields the URL of a server whose ``/metrics`` are another's and those above."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _work()
            body = httpx.get(f"{server_url}/metrics", timeout=30).content
            body += generate_latest(REGISTRY)
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """Says nothing: pytest shows what matters."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
