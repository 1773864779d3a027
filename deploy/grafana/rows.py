"""The dashboard's rows: five questions of an operator, each with the panels that answer it."""

from collections.abc import Callable

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import statetimeline, statushistory, table
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import (
    GREEN,
    RED,
    YELLOW,
    in_order,
    lines,
    number,
    ours,
    panel,
    quantile,
    query,
    rate,
    snapshot,
    stacked,
    states,
    thresholds,
    vllms,
)

NO_PREFILL = "no prefill in this interval"
NO_SPARSE = "nothing ran sparse in this interval"
NO_METRIC = "not reported: the server is down, or runs without vllm-afbs"
NOT_SAMPLED = "no error sampled: sampling is off, or nothing ran sparse"
NO_REQUEST = "no request finished in this interval"

SPARSE_SECONDS = rate(ours("prefill_attention_seconds_sum", path="sparse"))
DENSE_ESTIMATE = rate(ours("dense_estimate_seconds_total"))
SPEEDUP = f"{DENSE_ESTIMATE} / {SPARSE_SECONDS}"
SPARSE_TOKENS = rate(ours("prefill_tokens_total", path="sparse"))
SPARSE_SHARE = f"{SPARSE_TOKENS} / {rate(ours('prefill_tokens_total'))}"
LEVELS = f"max by (instance, level) ({ours('level')}) == 1"
GAIN = thresholds(RED, (1.0, YELLOW), (1.05, GREEN))

Panel = Builder[models.Panel]


def _sparsity(metric: str, *by: str) -> str:
    return f"{rate(ours(metric, outcome='skipped'), *by)} / {rate(ours(metric), *by)}"


def _mean(histogram: str, *by: str, **labels: str) -> str:
    total, count = (ours(f"{histogram}_{part}", **labels) for part in ("sum", "count"))
    return f"{rate(total, *by)} / {rate(count, *by)}"


def _without(*columns: str) -> models.DataTransformerConfig:
    """Leaves columns out of a table."""
    excluded = dict.fromkeys(("Time", "__name__", "job", *columns), True)
    return models.DataTransformerConfig(id_val="organize", options={"excludeByName": excluded})


def _is_it_on() -> list[Panel]:
    return [
        panel(
            number("unknown"), "Servers",
            "Whether Prometheus reaches each server. Nothing else on this page is worth reading "
            "for one that is down.",
            "Prometheus has no such target",
            query('up{job=~"$job",instance=~"$instance"}', "{{instance}}"),
            span=6, height=5,
        ).mappings(states("DOWN", "up")),
        panel(
            number("unknown"), "Kill switch",
            "Whether sparse attention is allowed. How to turn it, without a restart: "
            "docs/operations.md, Roll back.",
            NO_METRIC,
            query(f"min by (instance) ({ours('enabled')})", "{{instance}}"),
            span=6, height=5,
        ).mappings(states("OFF", "sparse allowed")),
        panel(
            number("unknown"), "Profile",
            "Whether a tuned profile is served. Without one every layer runs dense.",
            NO_METRIC,
            query(f"min by (instance) ({ours('profile_loaded')})", "{{instance}}"),
            span=6, height=5,
        ).mappings(states("NONE: all dense", "loaded")),
        panel(
            number(NO_PREFILL), "Prefill work that ran sparse",
            "Query tokens of prefills, summed over layers: the share that ran sparse. Prompts "
            "shorter than the profile's shortest calibrated length never do.",
            NO_PREFILL,
            query(SPARSE_SHARE),
            unit="percentunit", span=6, height=5,
        ).thresholds(thresholds(GREEN)),
        panel(
            stacked(), "Prefill tokens by path",
            "Query tokens of prefills per second, summed over layers. Sparse at zero with dense "
            "above it: see the fallbacks below.",
            NO_PREFILL,
            query(rate(ours("prefill_tokens_total"), "path"), "{{path}}"),
            unit="cps",
        ),
        panel(
            lines(), "Requests",
            "vLLM's requests running and waiting.",
            "vLLM reports nothing",
            query(f"sum({vllms('num_requests_running')})", "running"),
            query(f"sum({vllms('num_requests_waiting')})", "waiting"),
        ),
    ]  # fmt: skip


def _what_does_it_save() -> list[Panel]:
    return [
        panel(
            number(NO_SPARSE), "Speed-up of sparse layers",
            "What the sparse work would have taken dense, over what it took, selection included. "
            "Below 1 it costs time: disable it, and tune or measure again. The dense time is an "
            "estimate.",
            NO_SPARSE, query(SPEEDUP),
            unit="suffix:x", span=8, height=5,
        ).decimals(2).thresholds(GAIN),
        panel(
            number(NO_SPARSE), "Attention seconds saved per second",
            "Estimated dense time less the time taken, summed over layers and ranks: 0.5 means "
            "that every second half a second of one device's attention is saved.",
            NO_SPARSE, query(f"{DENSE_ESTIMATE} - {SPARSE_SECONDS}"),
            unit="s", span=8, height=5,
        ).thresholds(thresholds(RED, (0.0, GREEN))),
        panel(
            number(NO_SPARSE), "Block products skipped",
            "Of the products QK^T and PV that dense causal attention computes, the share that "
            "was left out.",
            NO_SPARSE, query(_sparsity("block_products_total")),
            unit="percentunit", span=8, height=5,
        ).thresholds(thresholds(GREEN)),
        panel(
            lines(), "Speed-up of sparse layers, by server",
            "As above, over time. A canary beside the others shows here first.",
            NO_SPARSE,
            query(
                f"{rate(ours('dense_estimate_seconds_total'), 'instance')} / "
                f"{rate(ours('prefill_attention_seconds_sum', path='sparse'), 'instance')}",
                "{{instance}}",
            ),
            unit="suffix:x",
        ),
        panel(
            lines(), "Attention of one layer in one step",
            "Mean time by path, and of the sparse path the part that selects blocks. On CUDA "
            "only steps with a long prefill are timed.",
            NO_PREFILL,
            query(_mean("prefill_attention_seconds", "path"), "{{path}}"),
            query(_mean("selector_seconds"), "selection"),
            unit="s",
        ),
        panel(
            lines(), "Time to first token",
            "vLLM's own, queueing included: what users see of the saving.",
            NO_REQUEST,
            query(quantile(0.5, "time_to_first_token_seconds"), "median"),
            query(quantile(0.95, "time_to_first_token_seconds"), "95 %"),
            unit="s", span=8,
        ),
        panel(
            lines(), "Inter-token latency",
            "vLLM's own. Decoding is dense, so it should only fall, as prefills that share its "
            "steps grow shorter.",
            NO_REQUEST,
            query(quantile(0.5, "inter_token_latency_seconds"), "median"),
            query(quantile(0.95, "inter_token_latency_seconds"), "95 %"),
            unit="s", span=8,
        ),
        panel(
            lines(), "Throughput",
            "vLLM's tokens per second: prompts read and answers written.",
            "vLLM reports nothing",
            query(rate(vllms("prompt_tokens_total")), "prompt"),
            query(rate(vllms("generation_tokens_total")), "generated"),
            unit="cps", span=8,
        ),
        _layers(
            "Block products skipped, by layer",
            "Which layers save. A row that stays at zero runs dense; its reason is among the "
            "fallbacks.",
            NO_SPARSE, _sparsity("block_products_total", "layer"), span=16,
        ),
        panel(
            table.Panel(), "Least sparse heads",
            "The twenty heads that skip the smallest share of their block products. Counting by "
            "head is opt-in.",
            "counting by head is off, or nothing ran sparse",
            snapshot(f"bottomk(20, {_sparsity('head_block_products_total', 'layer', 'head')})"),
            unit="percentunit", span=8, height=12,
        ).with_transformation(_without()),
    ]  # fmt: skip


def _layers(title: str, description: str, no_value: str, ratio: str, span: int) -> Panel:
    color = builders.FieldColor().mode(models.FieldColorModeId.CONTINUOUS_BL_PU)
    return (
        panel(
            statushistory.Panel(), title, description, no_value,
            query(in_order(ratio, "layer"), "{{layer}}"),
            unit="percentunit", span=span, height=12,
        )
        .max_data_points(60)
        .min(0)
        .max(1)
        .color_scheme(color)
        .show_value(common_models.VisibilityMode.NEVER)
    )  # fmt: skip


def _is_quality_safe() -> list[Panel]:
    by_layer = _mean("sampled_error", "layer")
    return [
        panel(
            number(NOT_SAMPLED), "Worst layer's sampled error",
            "Relative L1 between sparse and dense attention on sampled prefills: the mean of the "
            "layer where it is largest. Compare with the profile's tolerance, below. Off unless "
            "sample_rate is set.",
            NOT_SAMPLED, query(f"max({by_layer})"),
            unit="percentunit", span=8, height=5,
        ).decimals(1).thresholds(thresholds(GREEN, (0.05, YELLOW), (0.1, RED))),
        panel(
            number(NOT_SAMPLED), "Mean sampled error",
            "The same over all layers.",
            NOT_SAMPLED, query(_mean("sampled_error")),
            unit="percentunit", span=8, height=5,
        ).decimals(1).thresholds(thresholds(GREEN, (0.05, YELLOW), (0.1, RED))),
        panel(
            number(NOT_SAMPLED), "Samples per minute",
            "How many layers' prefills were compared. A few are no evidence; sampling costs the "
            "dense time of each.",
            NOT_SAMPLED, query(f"60 * {rate(ours('sampled_error_count'))}"),
            span=8, height=5,
        ).thresholds(thresholds(GREEN)),
        panel(
            lines(), "Sampled error of the five worst layers",
            "Means by layer. A level that rises while the profile stays says that traffic has "
            "moved away from the calibration texts: tune again with texts like it.",
            NOT_SAMPLED, query(f"topk(5, {by_layer})", "layer {{layer}}"),
            unit="percentunit",
        ),
        panel(
            lines(), "Sampled error, 95 % of samples",
            "By server: the tail that means hide, within the accuracy of the histogram's buckets.",
            NOT_SAMPLED,
            query(
                f"histogram_quantile(0.95, {rate(ours('sampled_error_bucket'), 'instance', 'le')})",
                "{{instance}}",
            ),
            unit="percentunit",
        ),
    ]  # fmt: skip


def _why_did_it_fall_back() -> list[Panel]:
    no_fallback = "no fallback since these servers started"
    counter = ours("dense_fallbacks_total")
    return [
        panel(
            stacked(), "Fallbacks by reason",
            "Prefills that a layer left to vLLM's dense attention, per second. short_query, "
            "short_context and dense_is_faster are the dispatcher's normal work; "
            "docs/operations.md says what each of the others asks for.",
            no_fallback, query(rate(counter, "reason"), "{{reason}}"),
            unit="cps", span=16,
        ),
        panel(
            table.Panel(), "Fallbacks in the chosen time",
            "The same as a count.",
            no_fallback,
            snapshot(f"sort_desc(sum by (reason) (increase({counter}[$__range])))"),
            span=8,
        ).decimals(0).with_transformation(_without()),
    ]  # fmt: skip


def _what_changed() -> list[Panel]:
    return [
        panel(
            table.Panel(), "Profiles being served",
            "One row per server. The tolerance is the error that the tuner allowed per head; "
            "created_at is when it tuned. Weights are the same, others, or not known to be those "
            "that were tuned.",
            "no profile is served", snapshot(ours("profile_info")), span=10,
        ).with_transformation(_without("Value")),
        panel(
            table.Panel(), "Levels being served",
            "The profile's level that each server serves: one row per server, or two for as long "
            "as its workers differ. How to change it, without a restart: docs/observability.md, "
            "Levels.",
            "no profile is served", snapshot(LEVELS), span=6,
        ).with_transformation(_without("Value")),
        panel(
            statetimeline.Panel(), "Profile, level and kill switch over time",
            "A new row is a new profile or level. All three are marked on every graph of this "
            "page.",
            NO_METRIC,
            query(f"min by (instance) ({ours('enabled')})", "{{instance}}: switch"),
            query(f"max by (instance, profile_id) ({ours('profile_info')})",
                  "{{instance}}: {{profile_id}}"),
            query(LEVELS, "{{instance}}: level {{level}}"),
            span=8,
        ).mappings(states("off", "on")),
    ]  # fmt: skip


ROWS: dict[str, Callable[[], list[Panel]]] = {
    "Is it on?": _is_it_on,
    "What does it save?": _what_does_it_save,
    "Is quality safe?": _is_quality_safe,
    "Why did it fall back?": _why_did_it_fall_back,
    "What changed?": _what_changed,
}
"""What makes each row's panels, by its title."""
