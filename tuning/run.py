"""A whole tuning job: from a model and a text to a profile."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_afbs.captures import Capture
from vllm_afbs.kernels import THETA_OFF
from vllm_afbs.profile.adapters import AdapterProfile
from vllm_afbs.profile.schema import HeadProfile, LayerLevel, LayerProfile, Level, Profile
from vllm_afbs.profile.tuner_run import TextSource, TunedOn, TunerRun
from vllm_afbs.tuning.allocation.acceptance import AcceptanceTest
from vllm_afbs.tuning.allocation.adapters import validated
from vllm_afbs.tuning.allocation.analytic import Division
from vllm_afbs.tuning.allocation.goal import Goal
from vllm_afbs.tuning.allocation.levels import LevelSearch, SearchKind, TunedLevel, Windows
from vllm_afbs.tuning.allocation.model_runs import Layers, ModelRuns
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.cost import AttentionTime, CostModel
from vllm_afbs.tuning.device import compute_device
from vllm_afbs.tuning.engine import Adapter, Engine, Model
from vllm_afbs.tuning.journal import FILE_NAME, Journal, Result
from vllm_afbs.tuning.level_rows import KL_BY_WINDOW, MEASURED_AT
from vllm_afbs.tuning.progress import Progress
from vllm_afbs.tuning.search.bracket import MIN_SPARSITY
from vllm_afbs.tuning.search.explore import EXPLORE_Q_BLOCKS
from vllm_afbs.tuning.search.layer import CURVE_Q_BLOCKS, LayerSearch
from vllm_afbs.tuning.search.results import HELD_OUT_SLACK, LayerCurves
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import Text
from vllm_afbs.tuning.windows import cut_windows

if TYPE_CHECKING:
    from vllm_afbs.tuning.workers import LayerPool


@dataclass(frozen=True, eq=False)
class Captured(Result):
    """That the layers' tensors are captured.

    Attributes:
        seconds: Wall time that it took; the step itself takes none.
    """

    seconds: float


def tune(
    model: Model,
    engine: Engine,
    texts: Sequence[Text],
    settings: SearchSettings,
    layers: Sequence[int],
    goal: Goal | None,
    kind: SearchKind,
    cost: CostModel,
    work: Path,
    progress: Progress,
    pool: "LayerPool | None" = None,
) -> Profile:
    """Tunes the heads of a model's layers.

    Args:
        model: The model.
        engine: Runs it.
        texts: The calibration texts; windows of the longest length are cut from them.
        settings: The search's settings.
        layers: Which layers with full attention to tune; the others run dense.
        goal: What the whole model is to reach; None to keep to the tolerance. A goal needs all of
            the layers tuned.
        kind: How the error is divided among layers.
        cost: Predicts the time of attention.
        work: Directory for the journal and the captures, made if there is none. A job whose journal
            is there goes on.
        progress: Is told how far the job is.
        pool: Workers that tune the layers side by side; None to tune one after another here.

    Returns:
        The profile. Its cost is that of all the job's runs together.

    Raises:
        InputError: The model, a text or the journal cannot be used, or the goal was not reached.
        OSError: The work directory cannot be written.
    """
    accepting = goal is not None and goal.kind == "perplexity"
    unseen = accepting or kind == "ax"
    cut = cut_windows(model.tokenizer(), texts, settings.longest, accepting=unseen)
    work.mkdir(exist_ok=True)
    journal = Journal(
        work / FILE_NAME,
        {
            "model": model.digest(),
            "texts": [text.sha256 for text in texts],
            "layers": list(layers),
            **asdict(settings),
        },
    )
    progress.begin("Capturing", len(layers) * len(cut.windows))
    # A step keeps only the seconds: whether there is a capture, its files say.
    start = time.perf_counter()
    taken = capture(model, engine, cut.windows, layers, work, progress.advance)
    engine.make_room()
    captured = journal.step("capture", Captured, lambda: Captured(time.perf_counter() - start))
    progress.begin("Tuning", len(layers))
    search = LayerSearches(settings, layers, taken, journal, progress, pool)
    curves = search.curves()
    parts = {f"unseen-{index}": part.tokens for index, part in enumerate(cut.acceptance)}
    windows = {**cut.windows, **parts}
    shape = model.fingerprint
    # With a goal, or a search that has the last word on the longest windows, levels are measured
    # there. On a CPU, a job without one would take past five minutes for that.
    is_quick = goal is None and kind == "analytic" and compute_device().type == "cpu"
    level_length = settings.lengths[-2] if is_quick else settings.longest
    levels, default, budget = LevelSearch(
        settings,
        ModelRuns(
            lambda: engine.sparse_model(settings.block_q, settings.block_k),
            windows,
            journal,
            lambda: progress.advance(1.0),
        ),
        search,
        curves,
        AttentionTime(cost, shape.head_dim, shape.num_heads),
        Windows(taken.held_out, tuple(parts) if kind == "ax" else ()),
        journal,
        progress,
        len(set(model.full_layers) - set(layers)),
        level_length,
    ).run(kind, goal, AcceptanceTest(cut.acceptance, journal, progress) if accepting else None)
    adapters = [
        _validated(adapter, settings, levels, windows, journal, progress)
        for adapter in engine.adapters
    ]
    sources = [
        TextSource(
            name=text.name, sha256=text.sha256, num_tokens=num_tokens, coverage=text.coverage
        )
        for text, num_tokens in zip(texts, cut.num_tokens, strict=True)
    ]
    run = TunerRun(
        version=version("vllm-afbs"),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=settings.seed,
        tolerance=settings.tolerance,
        lengths=settings.lengths,
        budget=budget,
        settings={
            "held_out_slack": HELD_OUT_SLACK,
            "min_sparsity": MIN_SPARSITY,
            "explore_q_blocks": EXPLORE_Q_BLOCKS,
            "curve_q_blocks": CURVE_Q_BLOCKS,
            "layers": list(layers),
            "search": kind,
            "time_from": cost.source,
            MEASURED_AT: level_length,
            KL_BY_WINDOW: {
                level.name: level.runs.kls for level in levels if level.runs is not None
            },
        },
        evaluations=int(journal.total("evaluations")),
        cost=journal.total("cost"),
        wall_seconds=journal.total("seconds") + captured.seconds,
    )
    return _profile(model, engine.tuned_on(), sources, settings, run, levels, default, adapters)


@dataclass(frozen=True)
class LayerSearches:
    """The searches over a job's layers, one after another or in a pool; a ``levels.Search``.

    Attributes:
        settings: The job's.
        layers: Which layers.
        taken: Their Q, K and V.
        journal: Where steps are kept.
        progress: Is told how far each layer is.
        pool: Workers that tune layers side by side, if any.
    """

    settings: SearchSettings
    layers: Sequence[int]
    taken: Capture
    journal: Journal
    progress: Progress
    pool: "LayerPool | None" = None

    def curves(self) -> dict[int, LayerCurves]:
        """Searches all layers."""
        advance = self._pooled({})
        return {layer: self._search(layer, advance).curves() for layer in self.layers}

    def settled(self, divisions: Sequence[Division]) -> list[Layers]:
        """All layers for each division; see ``levels.Search``."""
        wanted = {
            layer: sorted({division[layer] for division in divisions}) for layer in self.layers
        }
        self._pooled(wanted)
        heads = {
            layer: self._search(layer, _ignore).settled(tolerances)
            for layer, tolerances in wanted.items()
        }
        return [
            {
                layer: LayerLevel(heads=list(heads[layer][tolerance]), tolerance=tolerance)
                for layer, tolerance in division.items()
            }
            for division in divisions
        ]

    def _pooled(self, tolerances: Mapping[int, Sequence[float]]) -> Callable[[float], None]:
        """Has the pool do the steps, if there is one; returns whom to tell of further shares."""
        advance: Callable[[float], None] = self.progress.advance
        if self.pool is None:
            return advance
        if not tolerances:
            self.pool.search(self.settings, self.layers, {}, self.taken, self.journal, advance)
        else:
            self.pool.search(
                self.settings, self.layers, tolerances, self.taken, self.journal, _ignore
            )
        return _ignore  # what follows only reads what the workers found

    def _search(self, layer: int, on_progress: Callable[[float], None]) -> LayerSearch:
        return LayerSearch(self.settings, layer, self.taken, self.journal, on_progress)


def _ignore(_: float) -> None:
    pass


def _validated(
    adapter: Adapter,
    settings: SearchSettings,
    levels: Sequence[TunedLevel],
    windows: Mapping[str, Sequence[int]],
    journal: Journal,
    progress: Progress,
) -> AdapterProfile:
    num_runs = sum(len(level.runs.windows) for level in levels if level.runs is not None)
    progress.begin(f"Validating {adapter.name}", num_runs)
    runs = ModelRuns(
        lambda: adapter.sparse_model(settings.block_q, settings.block_k),
        windows,
        journal,
        lambda: progress.advance(1.0),
        adapter.sha256,
    )
    return validated(adapter, runs, levels)


def _profile(
    model: Model,
    tuned_on: TunedOn,
    sources: list[TextSource],
    settings: SearchSettings,
    run: TunerRun,
    levels: Sequence[TunedLevel],
    default: str,
    adapters: list[AdapterProfile],
) -> Profile:
    shape = model.fingerprint
    dense = LayerLevel(heads=[HeadProfile(tau=1.0, theta=THETA_OFF)] * shape.num_heads)
    return Profile(
        model_name=model.name,
        model=shape,
        model_weights_sha256=model.weights_sha256(),
        tuned_on=tuned_on,
        block_q=settings.block_q,
        block_k=settings.block_k,
        min_seq_len=settings.lengths[0],
        max_seq_len=settings.lengths[-1],
        levels=[
            Level(
                name=level.name,
                tolerance=level.tolerance,
                whole_model=None if level.runs is None else level.runs.whole,
                by_length=level.by_length,
            )
            for level in levels
        ],
        default_level=default,
        layers=[
            LayerProfile(levels=[level.layers.get(layer, dense) for level in levels])
            if layer in model.full_layers
            else LayerProfile(levels=[])
            for layer in range(shape.num_layers)
        ],
        adapters=adapters,
        calibration_texts=sources,
        tuner=run,
    )
