"""One tolerance for all layers beside tolerances divided among them, on a real model.

    python -m benchmarks.budget_allocation --output results.csv

Both are searched alike and measured alike, on held-out text at the longest length: the share of the
block products skipped, the KL divergence of the next-token distributions from the dense model's,
and the perplexity. How much more a division skips *at equal KL* is read off the line between the
two tolerances around it.
"""

import bisect
import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.command import benchmark_parser, report_rows
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.demo.assets import prepare
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.tuner_run import WholeModel
from vllm_afbs.tuning.allocation.budget import BudgetSearch
from vllm_afbs.tuning.allocation.goal import Goal
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.console import ProgressBar
from vllm_afbs.tuning.journal import FILE_NAME, Journal
from vllm_afbs.tuning.run import LayerSearches
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import cut_windows


def sparsity_at(kl: float, uniform: Sequence[WholeModel]) -> float | None:
    """What one tolerance for all would skip at a KL divergence; None outside what was measured."""
    points = sorted((math.log(each.kl), each.sparsity) for each in uniform)
    upper = bisect.bisect_left(points, (math.log(kl), 0.0))
    if not 0 < upper < len(points):
        return None
    (low, below), (high, above) = points[upper - 1], points[upper]
    return below + (above - below) * (math.log(kl) - low) / (high - low)


def rows_of(measured: Mapping[str, WholeModel], shape: str) -> list[Row]:
    """The figures of every tolerance and goal."""
    rows = []
    for name, whole in measured.items():
        increase = whole.perplexity / whole.dense_perplexity - 1.0
        rows += [
            make_row(f"{name}: sparsity", shape, [whole.sparsity], "ratio"),
            make_row(f"{name}: KL to dense", shape, [whole.kl], "nats"),
            make_row(f"{name}: increase of perplexity", shape, [increase], "ratio"),
        ]
    uniform = [whole for name, whole in measured.items() if name.startswith("tolerance")]
    for name, whole in measured.items():
        alone = sparsity_at(whole.kl, uniform) if whole not in uniform else None
        if alone is not None:
            what = f"{name}: sparsity of one tolerance at its KL"
            rows.append(make_row(what, shape, [alone], "ratio"))
    return rows


def main() -> None:
    """Runs the benchmark on the demo's model and text."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument(
        "--tolerances", type=float, nargs="+", default=[0.05, 0.0125, 0.025, 0.1],
        help="the first is searched from nothing, the others from it",
    )  # fmt: skip
    parser.add_argument("--increases", type=float, nargs="+", default=[0.02, 0.01, 0.005])
    args = parser.parse_args()
    base, *others = args.tolerances
    settings = SearchSettings(sorted(args.lengths), base, 128, 128, seed=0)
    assets = prepare()
    model = open_model(str(assets.model_dir))
    cut = cut_windows(model.tokenizer(), read_texts([assets.calibration_file]), settings.longest)
    layers = range(model.fingerprint.num_layers)
    shape = f"L{settings.longest}-{len(layers)} layers"
    measured: dict[str, WholeModel] = {}
    with tempfile.TemporaryDirectory() as folder, ProgressBar() as progress:
        journal = Journal(Path(folder) / FILE_NAME, {})
        engine = TransformersEngine(model)
        taken = capture(model, engine, cut.windows, layers, Path(folder), lambda _: None)
        searches = LayerSearches(settings, layers, taken, journal, progress)
        outer = BudgetSearch(
            lambda: engine.sparse_model(128, 128),
            settings,
            cut.windows,
            journal,
            searches,
            progress,
        )
        progress.begin(f"tolerance {base}", len(layers))
        uniform = searches.tuned({})
        measured[f"tolerance {base}"] = outer.whole_model("uniform", uniform)
        for tolerance in others:
            name = f"tolerance {tolerance}"
            progress.begin(name, len(layers))
            found = searches.tuned(dict(zip(layers, itertools.repeat(tolerance), strict=False)))
            measured[name] = outer.whole_model(name, found)
        for increase in args.increases:
            _, run = outer.run(Goal("perplexity", increase), uniform)
            measured[f"divided, perplexity up to +{increase:.1%}"] = run.allocated
    report_rows(rows_of(measured, shape), args.output)


if __name__ == "__main__":
    main()
