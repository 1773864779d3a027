"""Our tuner beside every alternative a user has, on a real model's heads.

    python -m vllm_afbs.benchmarks.tuner_arms --output results.csv

Every arm sees the same captured tensors through the same evaluator, and spends evaluations and cost
as ``tuning.scorer`` defines them. What an arm found is then measured alike: on a text that no arm
saw, at the longest length, with all rows. Lambda is left out of all, as the backend serves none.

- *afbs*: what ``vllm_afbs.tune`` runs, its validation on held-out text included.
- *spargeattn*: its own tuner: 32 values of theta, and for each a bisection on tau, per head, at the
  longest length with all rows.
- *grid*: 16 values of tau by 8 of theta.
- *random*: 32 draws a head.
- *one setting*: one tau for all heads of the model, no theta, by bisection on the mean error.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track

from vllm_afbs.benchmarks.table import Row, benchmark_parser, make_row, report_rows
from vllm_afbs.demo.assets import prepare
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.kernels.selection import THETA_OFF
from vllm_afbs.tuning.capture import Capture, capture
from vllm_afbs.tuning.journal import FILE_NAME, Journal
from vllm_afbs.tuning.model import open_model
from vllm_afbs.tuning.scorer import LayerScorer, SearchSettings
from vllm_afbs.tuning.search import LayerSearch
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import cut_windows

SPARGE_THETAS = 32
SPARGE_BISECTIONS = 10
GRID_TAUS, GRID_THETAS = 16, 8
RANDOM_DRAWS = 32
GLOBAL_BISECTIONS = 10


@dataclass(frozen=True)
class Found:
    """What an arm chose for one layer, and what it spent.

    Attributes:
        tau: ``[num_heads]``; 1 is dense.
        theta: ``[num_heads]``.
        evaluations: Heads scored.
        cost: Their cost.
        seconds: Wall time, nothing cached from other arms.
    """

    tau: torch.Tensor
    theta: torch.Tensor
    evaluations: float
    cost: float
    seconds: float


Arm = Callable[[LayerScorer, SearchSettings], tuple[torch.Tensor, torch.Tensor]]


class Best:
    """The sparsest thresholds within the tolerance seen so far, per head."""

    def __init__(self, num_heads: int, tolerance: float) -> None:
        """Begins dense."""
        self.tau = torch.ones(num_heads)
        self.theta = torch.full((num_heads,), THETA_OFF)
        self._sparsity = torch.zeros(num_heads, dtype=torch.float64)
        self._tolerance = tolerance

    def see(
        self, thresholds: HeadThresholds, error: torch.Tensor, sparsity: torch.Tensor
    ) -> torch.Tensor:
        """Takes what is better; returns which heads are within the tolerance."""
        within = error <= self._tolerance
        better = within & (sparsity > self._sparsity)
        self._sparsity = torch.where(better, sparsity, self._sparsity)
        self.tau = torch.where(better, thresholds.tau, self.tau)
        self.theta = torch.where(better, thresholds.theta, self.theta)
        return within


def spargeattn(scorer: LayerScorer, settings: SearchSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """SpargeAttn's tuner: every theta of a grid, and a bisection on tau for each."""
    evaluator = scorer.evaluator("calibration", settings.longest, None)
    everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
    best = Best(evaluator.num_heads, settings.tolerance)
    for theta in torch.linspace(-1.0, 1.0, SPARGE_THETAS).tolist():
        low, high = torch.zeros(evaluator.num_heads), torch.ones(evaluator.num_heads)
        for _ in range(SPARGE_BISECTIONS):
            tau = (low + high) / 2
            thresholds = HeadThresholds(tau, torch.full_like(tau, theta))
            scores = scorer.score(evaluator, thresholds, everyone)
            within = best.see(thresholds, scores.error, scores.sparsity)
            high = torch.where(within, tau, high)
            low = torch.where(within, low, tau)
    return best.tau, best.theta


def grid(scorer: LayerScorer, settings: SearchSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of a plain grid, for all heads at once."""
    evaluator = scorer.evaluator("calibration", settings.longest, None)
    everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
    best = Best(evaluator.num_heads, settings.tolerance)
    for theta in torch.linspace(-1.0, 1.0, GRID_THETAS).tolist():
        # Even in log(1 - tau), where error is even: as kind to the grid as to our own search.
        for depth in torch.linspace(0.2, 7.0, GRID_TAUS).tolist():
            tau = torch.full((evaluator.num_heads,), -torch.expm1(torch.tensor(-depth)).item())
            thresholds = HeadThresholds(tau, torch.full_like(tau, theta))
            scores = scorer.score(evaluator, thresholds, everyone)
            best.see(thresholds, scores.error, scores.sparsity)
    return best.tau, best.theta


def random_search(
    scorer: LayerScorer, settings: SearchSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform draws of (log(1 - tau), theta)."""
    evaluator = scorer.evaluator("calibration", settings.longest, None)
    everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
    best = Best(evaluator.num_heads, settings.tolerance)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(RANDOM_DRAWS):
        draws = torch.rand(2, evaluator.num_heads, generator=generator)
        thresholds = HeadThresholds(-torch.expm1(-7.0 * draws[0]), 2.0 * draws[1] - 1.0)
        scores = scorer.score(evaluator, thresholds, everyone)
        best.see(thresholds, scores.error, scores.sparsity)
    return best.tau, best.theta


BY_LAYER: dict[str, Arm] = {
    "spargeattn": spargeattn,
    "grid": grid,
    "random": random_search,
}


@dataclass(frozen=True)
class Bench:
    """The captured model, and the layers that are tuned.

    Attributes:
        tuned_on: Tensors of the calibration text.
        measured_on: Tensors of a text that no arm sees.
        settings: Of every arm.
        layers: Indices.
    """

    tuned_on: Capture
    measured_on: Capture
    settings: SearchSettings
    layers: Sequence[int]

    def by_layer(self, name: str) -> list[Found]:
        """Runs an arm that goes layer by layer."""
        found = []
        for layer in track(self.layers, name):
            scorer = LayerScorer(self.settings, layer, self.tuned_on)
            start = time.perf_counter()
            tau, theta = BY_LAYER[name](scorer, self.settings)
            seconds = time.perf_counter() - start
            found.append(Found(tau, theta, scorer.evaluations, scorer.cost, seconds))
        return found

    def afbs(self) -> list[Found]:
        """Runs our search."""
        found = []
        for layer in track(self.layers, "afbs"):
            with tempfile.TemporaryDirectory() as folder:
                journal = Journal(Path(folder) / FILE_NAME, {})
                search = LayerSearch(self.settings, layer, self.tuned_on, journal, lambda _: None)
                start = time.perf_counter()
                heads = search.run().heads
                seconds = time.perf_counter() - start
                tau, theta = (
                    torch.tensor([getattr(head, name) for head in heads])
                    for name in ("tau", "theta")
                )
                spent = (journal.total("evaluations"), journal.total("cost"))
                found.append(Found(tau, theta, *spent, seconds))
        return found

    def one_setting(self) -> list[Found]:
        """Bisects one tau for all heads of all layers."""
        start = time.perf_counter()
        scorers = [LayerScorer(self.settings, layer, self.tuned_on) for layer in self.layers]
        low, high = 0.0, 1.0
        for _ in range(GLOBAL_BISECTIONS):
            tau, errors = (low + high) / 2, []
            for scorer in scorers:
                evaluator = scorer.evaluator("calibration", self.settings.longest, None)
                everyone = torch.ones(evaluator.num_heads, dtype=torch.bool)
                thresholds = _uniform(evaluator.num_heads, tau)
                errors.append(scorer.score(evaluator, thresholds, everyone).error.mean())
            within = float(torch.stack(errors).mean()) <= self.settings.tolerance
            low, high = (low, tau) if within else (tau, high)
        seconds = (time.perf_counter() - start) / len(scorers)
        chosen = _uniform(everyone.numel(), high)
        return [
            Found(chosen.tau, chosen.theta, each.evaluations, each.cost, seconds)
            for each in scorers
        ]

    def rows(self, name: str, found: list[Found]) -> list[Row]:
        """What an arm spent, and what its choice is worth on the unseen text."""
        errors: list[float] = []
        sparsities: list[float] = []
        for layer, each in zip(self.layers, found, strict=True):
            scorer = LayerScorer(self.settings, layer, self.measured_on)
            evaluator = scorer.evaluator("calibration", self.settings.longest, None)
            scores = evaluator.score(HeadThresholds(each.tau, each.theta))
            dense = each.tau >= 1.0
            errors += scores.error.masked_fill(dense, 0.0).tolist()
            sparsities += scores.sparsity.masked_fill(dense, 0.0).tolist()
        heads = len(errors) / len(found)
        shape = f"L{self.settings.longest}-{len(errors)} heads-tolerance{self.settings.tolerance}"
        figures = {
            ("evaluations a head", "count"): [each.evaluations / heads for each in found],
            ("cost a head", "full evaluations"): [each.cost / heads for each in found],
            ("wall time a head", "seconds"): [each.seconds / heads for each in found],
            ("error on unseen text", "relative L1"): errors,
            ("sparsity on unseen text", "ratio"): sparsities,
            ("mean error on unseen text", "relative L1"): [statistics.fmean(errors)],
            ("mean sparsity on unseen text", "ratio"): [statistics.fmean(sparsities)],
        }
        return [
            make_row(f"{name}: {what}", shape, samples, unit)
            for (what, unit), samples in figures.items()
        ]


def _uniform(num_heads: int, tau: float) -> HeadThresholds:
    return HeadThresholds(torch.full((num_heads,), tau), torch.full((num_heads,), THETA_OFF))


def main() -> None:
    """Runs the arms on the demo's model and texts."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--every", type=int, default=5, help="take every n-th layer")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    assets = prepare()
    model = open_model(str(assets.model_dir))
    settings = SearchSettings(sorted(args.lengths), args.tolerance, 128, 128, args.seed)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():

        def captured(file: Path) -> Capture:
            cut = cut_windows(model, read_texts([file]), settings.longest)
            return capture(model, cut.windows, layers, Path(folder), lambda _: None)

        layers = range(0, model.fingerprint.num_layers, args.every)
        seen, unseen = captured(assets.calibration_file), captured(assets.prompt_file)
        bench = Bench(seen, unseen, settings, layers)
        rows = bench.rows("afbs", bench.afbs())
        rows += bench.rows("one setting", bench.one_setting())
        for name in BY_LAYER:
            rows += bench.rows(name, bench.by_layer(name))
            report_rows(rows, args.output)


if __name__ == "__main__":
    main()
