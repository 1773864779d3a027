"""The status of a running server as data: what it was tuned to beside what it has done."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version

from prometheus_client import Metric
from pydantic import BaseModel, Field

from vllm_afbs.observability import kill_switch, metric_files, metrics, served_level
from vllm_afbs.observability.served_level import Levels
from vllm_afbs.profile.adapters import AdapterProfile
from vllm_afbs.profile.schema import HeadProfile, Level, Profile, mean_calibration

Labels = frozenset[tuple[str, str]]


class Products(BaseModel):
    """Block products (QK^T and PV) since the server started."""

    computed: int
    skipped: int
    sparsity: float | None = Field(
        description="skipped / (computed + skipped); null: nothing was counted yet."
    )


class Head(BaseModel):
    """One query head."""

    head: int
    tau: float = Field(description="Share of the blocks' estimated mass to keep; 1: dense.")
    theta: float = Field(description="Blocks less self-similar than this are computed.")
    calibrated_sparsity: float = Field(description="At the longest calibrated length.")
    live: Products | None = Field(description="null: per_head_metrics is off.")


class Layer(BaseModel):
    """One decoder layer with full attention."""

    layer: int
    sparse: bool = Field(description="false: the profile leaves the layer dense.")
    tolerance: float = Field(description="Relative L1 allowed per head.")
    calibrated_sparsity: float = Field(description="Mean over heads at the longest length.")
    live: Products
    samples: int = Field(description="Steps that were also computed dense and compared.")
    sampled_error: float | None = Field(description="Mean relative L1 of them; null: none yet.")
    heads: list[Head]


class ServedProfile(BaseModel):
    """The profile that workers serve."""

    profile_id: str
    profile: Profile

    @classmethod
    def of(cls, profile: Profile) -> "ServedProfile":
        """Takes a profile and computes its digest once, rather than for every request."""
        return cls(profile_id=profile.profile_id, profile=profile)


class LevelState(BaseModel):
    """The level that workers are told to serve."""

    level: str
    start_level: str = Field(description="Chosen at start; served if the level's file is gone.")
    num_workers: int = Field(description="Workers of the server.")
    num_acknowledged: int = Field(description="Workers that serve this level from now on.")
    pending: str | None = Field(description="What is not certain yet; null: all acknowledged.")


class SwitchState(BaseModel):
    """The kill switch."""

    enabled: bool = Field(description="Whether layers may run sparse, as the switch says.")
    disabled_since: datetime | None = Field(
        description="UTC; null: enabled, or disabled because the switch's file is gone."
    )
    num_workers: int = Field(description="Workers of the server.")
    num_acknowledged: int = Field(description="Workers that last saw the switch as it is.")
    pending: str | None = Field(description="What is not certain yet; null: all acknowledged.")


class Status(SwitchState):
    """The whole server. Seconds and tokens are sums over layers and tensor-parallel ranks."""

    version: str
    backend: bool = Field(description="Whether the server runs --attention-backend afbs.")
    profile_id: str | None = Field(description="null: no profile, every layer runs dense.")
    model_name: str | None
    level: LevelState | None = Field(description="null: no profile.")
    levels: list[Level] = Field(
        description="The profile's, from nearly lossless to fast, with what each costs and saves."
    )
    adapters: list[AdapterProfile] = Field(
        description="LoRA adapters that may run sparse, with the levels that hold for each; empty "
        "unless the server was told so."
    )
    full_layers: int | None = Field(
        description="Layers with full attention; all figures are theirs. null: no profile."
    )
    other_layers: int | None = Field(
        description="Layers with windows, chunks or no attention: vLLM's own. null: no profile."
    )
    weights: str | None = Field(
        description="Whether the model's weight files are those that the profile was tuned on: "
        "same, other or unknown; null: no profile."
    )
    live: Products
    sparse_tokens: int = Field(description="Prefill tokens whose attention ran sparse.")
    dense_tokens: int
    sparse_seconds: float = Field(description="Attention that ran sparse, selection included.")
    dense_seconds: float
    selector_seconds: float
    saved_seconds: float = Field(
        description="Estimated: time of dense attention minus that of sparse."
    )
    samples: int
    sampled_error: float | None = Field(description="Mean relative L1 of sampled steps.")
    fallbacks: dict[str, int] = Field(description="Prefills that layers left dense, by reason.")


class Counters:
    """The workers' counters at one moment."""

    def __init__(self, families: Iterable[Metric]) -> None:
        """Takes the metrics that ``metric_files.read`` returns."""
        self._samples: dict[str, dict[Labels, float]] = defaultdict(dict)
        for family in families:
            for sample in family.samples:
                self._samples[sample.name][frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """The sample with exactly these labels; 0 if there is none yet."""
        return self._samples[name].get(frozenset(labels.items()), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums over all other labels, by the values of one label."""
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self._samples[name].items():
            sums[dict(labels)[label]] += value
        return sums

    def products(self, metric: metrics.Counter, **labels: str) -> Products:
        """Block products of one layer or one head."""
        name = f"{metric.name}_total"
        return _products(*(self.value(name, outcome=each, **labels) for each in _OUTCOMES))

    def all_products(self) -> Products:
        """Block products of all layers."""
        sums = self.by(f"{metrics.BLOCK_PRODUCTS.name}_total", "outcome")
        return _products(*(sums[outcome] for outcome in _OUTCOMES))


_OUTCOMES = ("computed", "skipped")


def _products(computed: float, skipped: float) -> Products:
    done = computed + skipped
    return Products(
        computed=round(computed), skipped=round(skipped), sparsity=skipped / done if done else None
    )


def switch_state(num_workers: int) -> SwitchState:
    """The kill switch, and how many workers have acknowledged it.

    Args:
        num_workers: Number of workers of the server.
    """
    state = kill_switch.read_state()
    # Workers that ended lately may still be counted.
    acknowledged = min(kill_switch.count_acknowledged(state.enabled), num_workers)
    pending = None
    if acknowledged < num_workers:
        other = "dense" if state.enabled else "sparse"
        pending = _pending(acknowledged, num_workers, f"run {other}", "switch")
    return SwitchState(
        enabled=state.enabled,
        disabled_since=state.disabled_since,
        num_workers=num_workers,
        num_acknowledged=acknowledged,
        pending=pending,
    )


def level_state(levels: Levels, num_workers: int) -> LevelState:
    """The level that is served, and how many workers have acknowledged it.

    Args:
        levels: The levels that may be served.
        num_workers: Number of workers of the server.
    """
    level = levels.read()
    acknowledged = min(served_level.count_acknowledged(level), num_workers)
    pending = None
    if acknowledged < num_workers:
        pending = _pending(acknowledged, num_workers, "serve another level", "level")
    return LevelState(
        level=level,
        start_level=levels.start,
        num_workers=num_workers,
        num_acknowledged=acknowledged,
        pending=pending,
    )


def _pending(acknowledged: int, num_workers: int, still: str, own: str) -> str:
    return (
        f"{num_workers - acknowledged} of {num_workers} workers have not acknowledged and may "
        f"still {still}: they are busy, or on another machine, which has its own {own}."
    )


def read_status(
    served: ServedProfile | None,
    levels: Levels | None,
    backend: bool,
    num_workers: int,
    weights: str,
    adapters: list[AdapterProfile],
) -> Status:
    """Reads what the server has done since it started.

    Args:
        served: The served profile.
        levels: Its levels.
        backend: Whether the server runs our attention backend.
        num_workers: Number of workers of the server.
        weights: Whether the model has the weights that the profile was tuned on.
        adapters: LoRA adapters that may run sparse.
    """
    counters = Counters(metric_files.read())
    tokens = counters.by(f"{metrics.PREFILL_TOKENS.name}_total", "path")
    seconds = counters.by(f"{metrics.PREFILL_ATTENTION_SECONDS.name}_sum", "path")
    estimate = counters.value(f"{metrics.DENSE_ESTIMATE_SECONDS.name}_total")
    fallbacks = counters.by(f"{metrics.DENSE_FALLBACKS.name}_total", "reason")
    error_sums = counters.by(f"{metrics.SAMPLED_ERROR.name}_sum", "layer")
    samples = counters.by(f"{metrics.SAMPLED_ERROR.name}_count", "layer")
    return Status(
        **switch_state(num_workers).model_dump(),
        version=version("vllm-afbs"),
        backend=backend,
        profile_id=served.profile_id if served else None,
        model_name=served.profile.model_name if served else None,
        level=level_state(levels, num_workers) if levels else None,
        levels=served.profile.levels if served else [],
        adapters=adapters,
        full_layers=len(served.profile.full_layers) if served else None,
        other_layers=(
            len(served.profile.layers) - len(served.profile.full_layers) if served else None
        ),
        weights=weights if served else None,
        live=counters.all_products(),
        sparse_tokens=round(tokens["sparse"]),
        dense_tokens=round(tokens["dense"]),
        sparse_seconds=seconds["sparse"],
        dense_seconds=seconds["dense"],
        selector_seconds=counters.value(f"{metrics.SELECTOR_SECONDS.name}_sum"),
        saved_seconds=estimate - seconds["sparse"],
        samples=round(sum(samples.values())),
        sampled_error=_mean(sum(error_sums.values()), sum(samples.values())),
        fallbacks={reason: round(count) for reason, count in fallbacks.items()},
    )


def read_layers(profile: Profile, level: int, per_head: bool) -> list[Layer]:
    """Reads what each layer was tuned to, and what it has done since the server started.

    Layers without full attention are left out.

    Args:
        profile: The served profile.
        level: Place of the level that is served, in the profile's levels.
        per_head: Whether block products are also counted for each head.
    """
    counters = Counters(metric_files.read())
    layers = []
    for index in profile.full_layers:
        tuned = profile.layers[index].levels[level]
        name, layer = metrics.SAMPLED_ERROR.name, str(index)
        samples = counters.value(f"{name}_count", layer=layer)
        layers.append(
            Layer(
                layer=index,
                sparse=tuned.is_sparse,
                tolerance=profile.tolerance_of(index, level),
                calibrated_sparsity=_calibrated(tuned.heads),
                live=counters.products(metrics.BLOCK_PRODUCTS, layer=layer),
                samples=round(samples),
                sampled_error=_mean(counters.value(f"{name}_sum", layer=layer), samples),
                heads=[
                    _head(counters if per_head else None, index, number, head)
                    for number, head in enumerate(tuned.heads)
                ],
            )
        )
    return layers


def _head(counters: Counters | None, layer: int, number: int, tuned: HeadProfile) -> Head:
    live = None
    if counters is not None:
        metric = metrics.HEAD_BLOCK_PRODUCTS
        live = counters.products(metric, layer=str(layer), head=str(number))
    return Head(
        head=number,
        tau=tuned.tau,
        theta=tuned.theta,
        calibrated_sparsity=_calibrated([tuned]),
        live=live,
    )


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _calibrated(heads: list[HeadProfile]) -> float:
    calibration = mean_calibration(heads)
    return calibration[-1][1] if calibration else 0.0
