"""The dashboard: its rows, what chooses the servers, and what is marked on every graph."""

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import DATASOURCE, Annotation, ours
from deploy.grafana.rows import ROWS

UID = "vllm-afbs"


def _variables() -> list[Builder[models.VariableModel]]:
    everything = models.VariableOption(selected=True, text="All", value="$__all")
    metric, chosen = "vllm:num_requests_running", ""
    variables: list[Builder[models.VariableModel]] = [
        builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    ]
    for name, label in (("job", "Job"), ("model_name", "Model"), ("instance", "Server")):
        variables.append(
            builders.QueryVariable(name)
            .label(label)
            .datasource(DATASOURCE)
            .query(f"label_values({metric}{{{chosen}}}, {name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.NATURAL_ASC)
            .multi(True)
            .include_all(True)
            .current(everything)
        )
        chosen += f'{"," if chosen else ""}{name}=~"${name}"'
    return variables


def build() -> models.Dashboard:
    """The whole dashboard, the same every time."""
    by_profile, info = "sum by (instance, profile_id)", ours("profile_info")
    by_level, level = "max by (instance, level)", ours("level")
    turned = f"{by_level} ({level} == 1) unless {by_level} ({level} offset 1m == 1)"
    switch = f"max by (instance) (changes({ours('enabled')}[1m])) > 0"
    result = (
        builders.Dashboard("vllm-afbs")
        .uid(UID)
        .description("Sparse attention in vLLM: is it on, what does it save, is quality safe, "
                     "why did it fall back, what changed. Generated: python -m deploy.grafana")
        .tags(["vllm", "vllm-afbs"])
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .variables(_variables())
        .annotation(Annotation(
            "Profile changes", f"{by_profile} ({info}) unless {by_profile} ({info} offset 1m)",
            "profile {{profile_id}}", "blue",
        ))
        .annotation(Annotation("Level changes", turned, "level {{level}}", "purple"))
        .annotation(Annotation("Kill switch", switch, "kill switch turned", "orange"))
    )  # fmt: skip
    count = 0
    for title, panels in ROWS.items():
        count += 1
        result.with_row(builders.Row(title).id(count))
        for one in panels():
            count += 1
            built = one.build()
            built.id_val = count
            result.with_panel(one)
    return result.build()
