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
from vllm_afbs.profile.schema import HeadProfile, LayerLevel, LayerProfile, Level, Profile
from vllm_afbs.profile.tuner_run import BudgetRun, TextSource, TunedOn, TunerRun
from vllm_afbs.tuning.allocation.acceptance import AcceptanceTest
from vllm_afbs.tuning.allocation.budget import BudgetSearch
from vllm_afbs.tuning.allocation.goal import Goal
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.engine import Engine, Model, SparseModel
from vllm_afbs.tuning.journal import FILE_NAME, Journal, Result
from vllm_afbs.tuning.progress import Progress
from vllm_afbs.tuning.search.explore import EXPLORE_Q_BLOCKS
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.refine import REFINE_Q_BLOCKS
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.search.validation import HELD_OUT_SLACK, MIN_SPARSITY
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
        goal: What the whole model is to reach; None to keep the tolerance in every layer. A goal
            needs all of these tuned.
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
    cut = cut_windows(model.tokenizer(), texts, settings.longest, accepting=accepting)
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
    engine.release()  # the search needs the memory
    captured = journal.step("capture", Captured, lambda: Captured(time.perf_counter() - start))
    progress.begin("Tuning", len(layers))
    search = LayerSearches(settings, layers, taken, journal, progress, pool)
    tuned, budget = search.tuned({}), None
    if goal is not None:
        test = AcceptanceTest(cut.acceptance, journal, progress) if accepting else None

        def load() -> SparseModel:
            return engine.sparse_model(settings.block_q, settings.block_k)

        outer = BudgetSearch(load, settings, cut.windows, journal, search, progress, test)
        tuned, budget = outer.run(goal, tuned)
    sources = [
        TextSource(
            name=text.name, sha256=text.sha256, num_tokens=num_tokens, coverage=text.coverage
        )
        for text, num_tokens in zip(texts, cut.num_tokens, strict=True)
    ]
    return _profile(model, engine.tuned_on(), sources, settings, journal, captured, tuned, budget)


@dataclass(frozen=True)
class LayerSearches:
    """The searches over a job's layers, one after another or in a pool; a ``budget.Search``.

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

    def tuned(self, tolerances: Mapping[int, float]) -> dict[int, LayerLevel]:
        """Tunes all layers; see ``budget.Search``."""
        advance: Callable[[float], None] = self.progress.advance
        if self.pool is not None:
            self.pool.search(
                self.settings, self.layers, tolerances, self.taken, self.journal, advance
            )
            advance = _ignore  # what follows only reads what the workers found
        return {
            layer: self._search(layer, advance).run(tolerances.get(layer)) for layer in self.layers
        }

    def of_layer(self, layer: int) -> LayerSearch:
        """The search over one layer; see ``budget.Search``."""
        return self._search(layer, _ignore)

    def _search(self, layer: int, on_progress: Callable[[float], None]) -> LayerSearch:
        return LayerSearch(self.settings, layer, self.taken, self.journal, on_progress)


def _ignore(_: float) -> None:
    pass


def _profile(
    model: Model,
    tuned_on: TunedOn,
    sources: list[TextSource],
    settings: SearchSettings,
    journal: Journal,
    captured: Captured,
    tuned: dict[int, LayerLevel],
    budget: BudgetRun | None,
) -> Profile:
    shape = model.fingerprint
    dense = LayerLevel(heads=[HeadProfile(tau=1.0, theta=THETA_OFF)] * shape.num_heads)
    full = {layer: tuned.get(layer, dense) for layer in model.full_layers}
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
            "refine_q_blocks": REFINE_Q_BLOCKS,
            "layers": list(tuned),
        },
        evaluations=int(journal.total("evaluations")),
        cost=journal.total("cost"),
        wall_seconds=journal.total("seconds") + captured.seconds,
    )
    level = Level.of_run(run, list(full.values()))
    return Profile(
        model_name=model.name,
        model=shape,
        model_weights_sha256=model.weights_sha256(),
        tuned_on=tuned_on,
        block_q=settings.block_q,
        block_k=settings.block_k,
        min_seq_len=settings.lengths[0],
        max_seq_len=settings.lengths[-1],
        levels=[level],
        default_level=level.name,
        layers=[
            LayerProfile(levels=[full[layer]] if layer in full else [])
            for layer in range(shape.num_layers)
        ],
        calibration_texts=sources,
        tuner=run,
    )
