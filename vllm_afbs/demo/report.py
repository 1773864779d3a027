"""The demo's results: tables for the terminal, and JSON and CSV files."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_afbs.demo.comparison import Outcome, shift
from vllm_afbs.files import write_atomically

BAR_CELLS = 30
SECONDS = ("ttft_seconds", "attention_seconds", "selector_seconds", "total_seconds")


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Makes one record for each server; all are compared with the first."""
    stock = outcomes[0].completion
    return [
        {
            "server": outcome.arm.name,
            "backend": outcome.arm.backend,
            "ttft_seconds": outcome.completion.ttft_seconds,
            "attention_seconds": outcome.attention_seconds,
            "selector_seconds": outcome.selector_seconds,
            "total_seconds": outcome.completion.total_seconds,
            "sparsity": outcome.sparsity,
            **asdict(shift(stock, outcome.completion)),
        }
        for outcome in outcomes
    ]


def write(outcomes: list[Outcome], setup: dict[str, Any], directory: Path) -> None:
    """Writes ``results.json``, ``servers.csv`` and ``layers.csv``.

    Raises:
        OSError: The directory cannot be written.
    """
    servers = rows(outcomes)
    write_atomically(directory / "servers.csv", _csv(servers))
    for record, outcome in zip(servers, outcomes, strict=True):
        record["fallbacks"] = outcome.fallbacks
        record["sparsity_by_layer"] = outcome.sparsity_by_layer
        record["text"] = outcome.completion.text
    results = {"setup": setup, "servers": servers}
    write_atomically(directory / "results.json", json.dumps(results, indent=2) + "\n")
    layers = [
        {"server": outcome.arm.name, "layer": layer, "sparsity": sparsity}
        for outcome in outcomes
        for layer, sparsity in outcome.sparsity_by_layer.items()
    ]
    write_atomically(directory / "layers.csv", _csv(layers))


def _csv(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints the tables."""
    servers = rows(outcomes)
    console.print(_times(servers))
    console.print(_shifts(servers[1:]))
    for outcome in outcomes:
        if outcome.sparsity_by_layer:
            console.print(_layers(outcome))
        for reason, count in outcome.fallbacks.items():
            console.print(f"{outcome.arm.name}: left to vLLM's dense backend: {count:g} x {reason}")


def _times(servers: list[dict[str, Any]]) -> Table:
    table = Table(title="One prompt, one server after the other", title_justify="left")
    table.add_column("server")
    for heading in ("time to first token", "attention", "selector alone", "whole answer"):
        table.add_column(heading, justify="right")
    table.add_column("sparsity", justify="right")
    for server in servers:
        sparsity = server["sparsity"]
        table.add_row(
            f"{server['server']} ({server['backend']})",
            *(_seconds(server[name], servers[0][name]) for name in SECONDS),
            "-" if sparsity is None else f"{sparsity:.1%}",
        )
    table.caption = "In brackets: how many times faster than stock. A stock server does not report "
    table.caption += "its attention time; the row below it gives that of the same dense kernel."
    return table


def _seconds(value: float | None, stock: float | None) -> str:
    if value is None:
        return "-"
    ratio = f" ({stock / value:.2f}x)" if stock else ""
    return f"{value:.2f} s{ratio}"


def _shifts(servers: list[dict[str, Any]]) -> Table:
    table = Table(title="Next-token distribution against stock", title_justify="left")
    headings = ("KL, nats", "total variation", "same top-1", "mean KL", "greedy tokens agreeing")
    table.add_column("server")
    for heading in headings:
        table.add_column(heading, justify="right")
    for server in servers:
        table.add_row(
            f"{server['server']} ({server['backend']})",
            f"{server['kl_first']:.2e}",
            f"{server['tv_first']:.4f}",
            "yes" if server["same_top_1"] else "no",
            f"{server['kl_mean']:.2e}",
            str(server["agreed_tokens"]),
        )
    table.caption = (
        "Lower bounds: computed from each side's 20 likeliest tokens, with all others as "
    )
    table.caption += (
        "one outcome. The mean is over positions where both predict from the same text."
    )
    return table


def _layers(outcome: Outcome) -> Table:
    title = f"Block products skipped per layer: {outcome.arm.name}, from its /metrics"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for layer, sparsity in outcome.sparsity_by_layer.items():
        bar = "█" * round(sparsity * BAR_CELLS)
        table.add_row(f"layer {layer}", f"{sparsity:6.1%}", bar)
    return table
