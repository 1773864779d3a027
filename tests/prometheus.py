"""A real Prometheus for tests, and the expressions that it has to answer."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from vllm_afbs.demo.server import HOST, free_port

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "rules" / "vllm-afbs.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "vllm-afbs.json"
VARIABLES = {
    "$__rate_interval": "1m",
    "$__range": "1m",
    "$job": ".*",
    "$model_name": ".*",
    "$instance": ".*",
}
START_SECONDS = 30.0


def tool(name: str) -> str:
    """A program of Prometheus's: on the path, or where ``make prometheus`` unpacks it."""
    unpacked = Path(sys.prefix) / "prometheus" / "usr" / "bin"
    path = shutil.which(name, path=f"{unpacked}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"needs {name}: run make prometheus")
    return path


def panel_expressions() -> dict[str, str]:
    """The dashboard's queries by panel and reference, Grafana's variables filled in."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    expressions = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            expressions[f"{panel['title']} {target['refId']}"] = expression
    return expressions


def rules(kind: str) -> dict[str, str]:
    """Expressions of the rules that ``record`` or ``alert``, by name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule[kind]: rule["expr"] for group in groups for rule in group["rules"] if kind in rule}


def metric_names(expression: str) -> set[str]:
    """The metrics of ours and vLLM's that an expression reads."""
    return set(re.findall(r"[a-z_:]*vllm[a-z0-9_:]*", expression))


class Prometheus:
    """One that runs, at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        answer.raise_for_status()
        return answer.json()["data"]

    def query(self, expression: str) -> list[float]:
        """The values that an expression has now; those that are not a number are left out."""
        result = self.get("query", query=expression)["result"]
        values = [float(series["value"][1]) for series in result]
        return [value for value in values if value == value]

    def wait_for_scrapes(self, number: int) -> None:
        """Waits until it has read its target this many times more; the first takes seconds."""
        enough = self._num_scrapes() + number
        deadline = time.monotonic() + START_SECONDS
        while self._num_scrapes() < enough:
            assert time.monotonic() < deadline, "Prometheus does not read its target"
            time.sleep(0.1)

    def _num_scrapes(self) -> int:
        return int(max(self.query("sum_over_time(up[10m])"), default=0))


@contextmanager
def running_prometheus(target_url: str, directory: Path) -> Iterator[Prometheus]:
    """Runs the deployed configuration against another target, every second.

    Args:
        target_url: Of a server with ``/metrics``.
        directory: For its configuration and data.
    """
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target_url.split("//")[1]]
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"{HOST}:{free_port()}"
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={path}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(process, f"http://{address}", directory / "prometheus.log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Waits for its API; its log is the failure's message."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/-/ready", timeout=1).is_success:
                return
        time.sleep(0.1)
    pytest.fail(f"Prometheus did not start:\n{log.read_text('utf-8', errors='replace')}")


def assert_everything_has_data(prometheus: Prometheus) -> None:
    """Every panel and recorded rule has a value, and every alert something to look at."""
    expressions = panel_expressions() | rules("record")
    silent = {name: expr for name, expr in expressions.items() if not prometheus.query(expr)}
    assert not silent, silent
    for name, expression in rules("alert").items():
        names = metric_names(expression)
        assert names, name
        unknown = {metric for metric in names if not prometheus.query(f"count({metric})")}
        assert not unknown, f"{name}: {unknown}"
    loaded = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(loaded) == len(rules("record") | rules("alert"))
    assert {rule["health"] for rule in loaded} == {"ok"}
    assert not [rule["name"] for rule in loaded if rule.get("lastError")]
