"""Building blocks of the dashboard: queries, and panels that tell no data from zero."""

from typing import TypeVar

from grafana_foundation_sdk.builders import (
    common,
    prometheus,
    stat,
    statetimeline,
    statushistory,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, GREY = "green", "yellow", "red", "text"

PanelT = TypeVar(
    "PanelT",
    stat.Panel,
    timeseries.Panel,
    table.Panel,
    statetimeline.Panel,
    statushistory.Panel,
)


def ours(metric: str, **labels: str) -> str:
    """Selects series of ours, ``vllm_afbs_{metric}``, of the chosen servers."""
    return _selector(f"vllm_afbs_{metric}", 'job=~"$job",instance=~"$instance"', labels)


def vllms(metric: str, **labels: str) -> str:
    """Selects series of vLLM's own, ``vllm:{metric}``, of the chosen servers and model."""
    chosen = 'job=~"$job",instance=~"$instance",model_name=~"$model_name"'
    return _selector(f"vllm:{metric}", chosen, labels)


def _selector(name: str, chosen: str, labels: dict[str, str]) -> str:
    conditions = [chosen, *(f'{label}="{value}"' for label, value in labels.items())]
    return f"{name}{{{','.join(conditions)}}}"


def rate(selector: str, *by: str) -> str:
    """Growth per second of counters, summed over all labels but ``by``."""
    grouping = f" by ({', '.join(by)}) " if by else ""
    return f"sum{grouping}(rate({selector}[$__rate_interval]))"


def quantile(q: float, metric: str) -> str:
    """A quantile of one of vLLM's histograms over all chosen servers."""
    return f"histogram_quantile({q:g}, {rate(vllms(f'{metric}_bucket'), 'le')})"


def in_order(expression: str, label: str) -> str:
    """Pads a numeric label to three digits, so that sorting by name sorts by number."""
    for pattern, zeros in ((".", "00"), ("..", "0")):
        expression = (
            f'label_replace({expression}, "{label}", "{zeros}$1", "{label}", "({pattern})")'
        )
    return expression


def query(expression: str, legend: str = "__auto") -> prometheus.Dataquery:
    """A query over the dashboard's time range."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).range()


def snapshot(expression: str) -> prometheus.Dataquery:
    """A query of the last value only, as rows of a table."""
    return prometheus.Dataquery().expr(expression).format(PromQueryFormat.TABLE).instant()


def panel(
    kind: PanelT,
    title: str,
    description: str,
    no_value: str,
    *queries: prometheus.Dataquery,
    unit: str = "none",
    span: int = 12,
    height: int = 8,
) -> PanelT:
    """What every panel has.

    Args:
        kind: An empty panel.
        title: What is shown.
        description: What it means, and what to do about it.
        no_value: What no data means here; it is shown in its place.
        queries: At least one.
        unit: Grafana's name of the unit.
        span: Width, of 24 columns.
        height: In rows of the dashboard's grid.

    Returns:
        The same panel, for more settings.
    """
    kind.title(title).description(f"{description}\n\n*No data*: {no_value}.")
    kind.datasource(DATASOURCE).unit(unit).span(span).height(height).no_value(no_value)
    for number, one in enumerate(queries):
        kind.with_target(one.ref_id(chr(ord("A") + number)).datasource(DATASOURCE))
    return kind


def lines() -> timeseries.Panel:
    """An empty graph from zero upwards; gaps stay gaps, so that they do not look like zero."""
    return (
        timeseries.Panel()
        .min(0)
        .span_nulls(False)
        .fill_opacity(8)
        .show_points(common_models.VisibilityMode.AUTO)
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    )


def stacked() -> timeseries.Panel:
    """An empty graph whose series add up."""
    stacking = common.StackingConfig().mode(common_models.StackingMode.NORMAL)
    return lines().stacking(stacking).fill_opacity(40)


def number(not_a_number: str) -> stat.Panel:
    """An empty panel of one last value per series.

    Args:
        not_a_number: What 0 / 0 means here.
    """
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    text = models.SpecialValueMap(
        options=models.DashboardSpecialValueMapOptions(
            match=models.SpecialValueMatch.NA_N,
            result=models.ValueMappingResult(text=not_a_number, color=GREY),
        )
    )
    return stat.Panel().reduce_options(last).mappings([text])


def states(zero: str, one: str) -> list[models.ValueMapping]:
    """Names for a gauge that is 0 where something is wrong and 1 where all is well."""
    return [
        models.ValueMap(
            options={
                "0": models.ValueMappingResult(text=zero, color=RED, index=0),
                "1": models.ValueMappingResult(text=one, color=GREEN, index=1),
            }
        )
    ]


def thresholds(base: str, *steps: tuple[float, str]) -> builders.ThresholdsConfig:
    """Colours from values on.

    Args:
        base: The colour below all steps.
        steps: From which value on, and the colour.
    """
    values = [(None, base), *steps]
    return (
        builders.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in values])
    )


class Annotation(models.AnnotationQuery, Builder[models.AnnotationQuery]):
    """An annotation from Prometheus; the SDK's knows no text of its own.

    Args:
        name: Its switch at the dashboard's top.
        expression: Marks the times at which it has a series that is not zero.
        title: With labels in double braces.
        color: Of the mark.
    """

    def __init__(self, name: str, expression: str, title: str, color: str) -> None:
        super().__init__(name=name, datasource=DATASOURCE, icon_color=color, expr=expression)
        self.title = title

    def build(self) -> models.AnnotationQuery:
        """What the SDK's dashboard asks of its parts."""
        return self

    def to_json(self) -> dict[str, object]:
        """With the fields that Grafana's Prometheus annotations add."""
        return super().to_json() | {
            "titleFormat": self.title,
            "tagKeys": "instance",
            "step": "60s",
        }
