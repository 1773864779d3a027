"""The dashboard is what its code says, and the rules do what they promise."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from deploy.grafana import __main__ as generator
from tests.prometheus import DASHBOARD, DEPLOY, RULES, rules, tool
from vllm_afbs.serving import reasons

SERIES_PANELS = {"timeseries", "stat", "table", "status-history", "state-timeline"}


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_committed_dashboard_is_the_generated_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generator.main(["--check"]) == 0
    changed = tmp_path / "dashboards" / "changed.json"
    monkeypatch.setattr(generator, "OUTPUT", changed)
    assert generator.main(["--check"]) == 1
    assert str(changed) in capsys.readouterr().out
    assert generator.main([]) == 0
    assert changed.read_bytes() == DASHBOARD.read_bytes()


def test_every_panel_says_what_it_means_and_what_no_data_means() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "job", "model_name", "instance"]
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert {panel["type"] for panel in panels} == SERIES_PANELS
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        no_value = panel["fieldConfig"]["defaults"]["noValue"]
        assert no_value in panel["description"]
        for target in panel["targets"]:
            assert "[5m]" not in target["expr"]
            assert 'instance=~"$instance"' in target["expr"]


def test_rules_and_configuration_are_valid() -> None:
    run(tool("promtool"), "check", "rules", RULES)
    run(tool("promtool"), "check", "config", "--syntax-only", DEPLOY / "prometheus/prometheus.yml")


@pytest.mark.parametrize("file", sorted((DEPLOY / "prometheus/tests").glob("*.yml")))
def test_alerts_fire_when_they_should_and_only_then(file: Path) -> None:
    assert "SUCCESS" in run(tool("promtool"), "test", "rules", file)


def test_the_operators_page_explains_every_alert_and_every_reason_that_rules_name() -> None:
    page = (DEPLOY.parent / "docs/operations.md").read_text(encoding="utf-8")
    alerts = set(rules("alert"))
    assert alerts == set(re.findall(r"^\| `(VllmAfbs\w+)`", page, re.MULTILINE))
    named = {
        reason
        for expression in rules("record").values()
        for listed in re.findall(r'reason[=!]~"([^"]+)"', expression)
        for reason in listed.split("|")
    }
    table = page.split("### Fallback reasons")[1].split("\n### ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]
    kinds = {
        reason: kind.strip() for names, kind in rows for reason in re.findall(r"`(\w+)`", names)
    }
    assert kinds == reasons.KINDS
    assert named == {reason for reason, kind in kinds.items() if kind != "changing"}
    fixed = rules("record")["instance:vllm_afbs_fixed_fallbacks:rate5m"]
    (listed,) = re.findall(r'reason=~"([^"]+)"', fixed)
    assert set(listed.split("|")) == {why for why, kind in kinds.items() if kind == "fixed"}

    conditions = page.split("### What runs dense, what is refused")[1].split("\n## ")[0]
    labels = set(re.findall(r"\| `(\w+)` \|$", conditions, re.MULTILINE))
    chosen = {"dense_is_faster", "profile_dense", "no_profile", "disabled"}
    assert labels == kinds.keys() - chosen - {"unknown_lengths"}
