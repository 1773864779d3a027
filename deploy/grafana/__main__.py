"""Writes the dashboard's JSON, or checks that the committed one is what the code says."""

import argparse
import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.dashboard import build

OUTPUT = Path(__file__).with_name("dashboards") / "vllm-afbs.json"


def dashboard_json() -> str:
    """The dashboard as Grafana reads it."""
    return json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; the exit status is 1 if ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether it fits")
    text = dashboard_json()
    if not parser.parse_args(arguments).check:
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(text, encoding="utf-8")
        return 0
    if OUTPUT.exists() and OUTPUT.read_text(encoding="utf-8") == text:
        return 0
    print(f"{OUTPUT}: differs from the code; run python -m deploy.grafana")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
