"""Tuned profiles beside every sparse baseline at equal sparsity, on several kinds of text.

    python -m vllm_afbs.benchmarks.quality --texts python NAME=CALIBRATION,MEASURED ...
        --profile NAME=profile.json ... --output results.csv

Every method's knob is set on a text's calibration part and measured on its other part; the last
setting measures the first text with what the second one calibrated. Of several candidates of one
name (profiles of one text, SpargeAttn's tuner at several tolerances) the one that has to be moved
least counts. The sparsity that is reported is the one measured.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_afbs.benchmarks.table import Row, benchmark_parser, make_row, write_rows
from vllm_afbs.benchmarks.tuner_arms.arms import swept
from vllm_afbs.benchmarks.tuner_arms.samples import Domain
from vllm_afbs.benchmarks.tuner_arms.sweeps import spargeattn
from vllm_afbs.demo.assets import prepare
from vllm_afbs.evaluate.baselines import Tuned, baselines, of_profile, variants
from vllm_afbs.evaluate.comparison import (
    KL,
    LOSS,
    PERPLEXITY,
    RETRIEVAL,
    Comparison,
    compare,
    worst,
)
from vllm_afbs.evaluate.in_process import InProcess, Runner
from vllm_afbs.evaluate.matching import knob_at, settle
from vllm_afbs.evaluate.methods import BLOCK, Method, Selection
from vllm_afbs.evaluate.suite import Amounts, Answers, Suite, ask, load_tokenizer, make_suite
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile import load_profile
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.journal import FILE_NAME, Journal, Record
from vllm_afbs.tuning.model import SourceModel, open_model
from vllm_afbs.tuning.scorer import SearchSettings
from vllm_afbs.tuning.texts import Text, read_texts
from vllm_afbs.tuning.windows import CALIBRATION, cut_windows

PYTHON, ANY = "python", "any"
OURS, THEIRS = "afbs", "SpargeAttn, tuned"
AS_TUNED = "as tuned"
_TEXT_FIGURES = {
    (PERPLEXITY, "all positions"): "perplexity ratio",
    (LOSS, "truncated prefixes"): "next-token loss less dense",
    (KL, "truncated prefixes"): "next-token KL to dense",
    (RETRIEVAL, "all kinds"): "retrieval less dense",
}
Candidates = dict[str, list[Method]]


@dataclass(frozen=True)
class Setting:
    """Where methods are set and where they are measured."""

    calibration: Domain
    measured: Domain

    @property
    def name(self) -> str:
        """As results call it."""
        own = self.calibration.name == self.measured.name
        return self.measured.name if own else f"{self.measured.name} by {self.calibration.name}"


@dataclass(frozen=True)
class Plan:
    """What every setting shares; a journal of another plan is refused.

    Attributes:
        model: The model's directory.
        amounts: What is asked of texts.
        per_kind: Retrieval prompts of a kind.
        retrieval: The sparsities at which they are asked.
        tolerances: Of SpargeAttn's tuner.
        sparge_length: Tokens that it tunes on.
    """

    model: str
    amounts: Amounts
    per_kind: int
    retrieval: tuple[float, ...]
    tolerances: tuple[float, ...]
    sparge_length: int


class Bench:
    """One setting: its texts, and the methods that are compared on them.

    Args:
        plan: What all settings share.
        setting: This one.
        model: The model.
        runner: It, loaded.
        journal: Where steps are kept.
    """

    def __init__(
        self, plan: Plan, setting: Setting, model: SourceModel, runner: Runner, journal: Journal
    ) -> None:
        self._plan = plan
        self._setting = setting
        self._model = model
        self._runner = runner
        self._journal = journal

    def run(self, candidates: Candidates, sparsities: Sequence[float]) -> Iterator[Record]:
        """Measures every method at every sparsity; yields each as it is done, or was before."""
        levels = self._levels(candidates, sparsities)
        for name, methods in candidates.items():
            for sparsity in sparsities:
                yield self._measured(name, methods, levels, sparsity)
            for number, method in enumerate(methods):
                if isinstance(method, Tuned) and name == OURS:
                    alone = f"{name} {number + 1}, {AS_TUNED}"
                    yield self._step(alone, partial(self._figures, Selection(method, 0.0), None))

    def tuned_by_spargeattn(self) -> list[Method]:
        """SpargeAttn's tuner on the calibration text, at every tolerance."""
        methods: list[Method] = []
        for tolerance in self._plan.tolerances:
            record = self._journal.step(
                f"{self._setting.calibration.name}: SpargeAttn's tuner, {tolerance}",
                partial(self._sparge, tolerance),
            )
            thresholds = {
                layer: HeadThresholds(torch.tensor(tau), torch.tensor(theta))
                for layer, (tau, theta) in enumerate(record["thresholds"])
            }
            methods.append(Tuned(THEIRS, thresholds=thresholds))
        return methods

    def _sparge(self, tolerance: float) -> Record:
        length = self._plan.sparge_length
        settings = SearchSettings([length // 2, length], tolerance, BLOCK, BLOCK, seed=0)
        cut = cut_windows(self._model, read_texts([self._setting.calibration.calibration]), length)
        layers = range(self._model.fingerprint.num_layers)
        windows = {CALIBRATION: cut.windows[CALIBRATION]}
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            taken = capture(self._model, windows, layers, Path(folder), lambda _: None)
            found = swept(spargeattn)(settings, layers, taken)
        return {"thresholds": [[each.tau.tolist(), each.theta.tolist()] for each in found]}

    def _levels(
        self, candidates: Candidates, sparsities: Sequence[float]
    ) -> dict[int, list[torch.Tensor]]:
        """Of a dense run, by identity of the methods that have still something to do."""
        methods = [
            method
            for name, each in candidates.items()
            if any(self._key(f"{name} at {s}") not in self._journal for s in sparsities)
            for method in each
        ]
        found = self._runner.levels(self._calibration, methods) if methods else []
        return {id(method): each for method, each in zip(methods, found, strict=True)}

    def _measured(
        self,
        name: str,
        methods: Sequence[Method],
        levels: Mapping[int, list[torch.Tensor]],
        sparsity: float,
    ) -> Record:
        def compute() -> Record:
            # Tuned ones' knobs say how far they are moved; others stand alone.
            method = min(methods, key=lambda each: abs(knob_at(levels[id(each)], sparsity)))
            dense = levels[id(method)]
            selection = settle(self._runner, self._calibration, method, dense, sparsity)
            return self._figures(selection, sparsity)

        return self._step(f"{name} at {sparsity}", compute)

    def _step(self, name: str, compute: Callable[[], Record]) -> Record:
        known = self._key(name) in self._journal
        record = self._journal.step(self._key(name), compute)
        if not known:
            print(
                f"{self._setting.name}: {name}: sparsity {record['sparsity']:.3f}, "
                f"{record['seconds']:.1f} s",
                flush=True,
            )
        return {**record, "setting": self._setting.name, "method": name}

    def _key(self, name: str) -> str:
        return f"{self._setting.name}: {name}"

    def _figures(self, selection: Selection, sparsity: float | None) -> Record:
        suite, dense = self._on_text
        answers = ask(InProcess(self._runner, selection), suite)
        found = compare(suite, dense, answers)
        if sparsity is None or sparsity in self._plan.retrieval:
            suite, dense = self._on_facts
            found += compare(suite, dense, ask(InProcess(self._runner, selection), suite))
        return {
            "knob": max(min(selection.knob, 1e300), -1e300),
            "sparsity": answers.sparsity,
            "results": [asdict(each) for each in found],
        }

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._model)

    @cached_property
    def _calibration(self) -> list[int]:
        text = read_texts([self._setting.calibration.calibration])[0]
        amounts = Amounts(self._plan.amounts.length, 1, 0, 0, 1, 0)
        return make_suite(self._tokenizer, text, amounts).windows[0]

    @cached_property
    def _measured_text(self) -> Text:
        return read_texts([self._setting.measured.measured])[0]

    @cached_property
    def _on_text(self) -> tuple[Suite, Answers]:
        return self._asked(self._plan.amounts)

    @cached_property
    def _on_facts(self) -> tuple[Suite, Answers]:
        return self._asked(Amounts(self._plan.amounts.length, 0, 0, 0, 1, self._plan.per_kind))

    def _asked(self, amounts: Amounts) -> tuple[Suite, Answers]:
        suite = make_suite(self._tokenizer, self._measured_text, amounts)
        return suite, ask(InProcess(self._runner, None), suite)


def rows_of(records: Sequence[Record], length: int) -> list[Row]:
    """What is kept of every measurement."""
    rows = []
    for record in records:
        shape = f"{record['setting']}-L{length}"

        def add(what: str, value: float, unit: str, record: Record = record, at: str = shape) -> None:
            rows.append(make_row(f"{record['method']}: {what}", at, [value], unit))

        add("sparsity", record["sparsity"], "ratio")
        comparisons = [Comparison(**each) for each in record["results"]]
        for each in comparisons:
            if what := _TEXT_FIGURES.get((each.test, each.part)):
                unit = "ratio" if each.test == PERPLEXITY else each.unit
                for name, value in (("", each.change), (", low", each.low), (", high", each.high)):
                    add(f"{what}{name}", value, unit)
        if (loser := worst(comparisons)) is not None:
            add(f"worst task, {loser.part}", loser.change, loser.unit)
    return rows


def show(records: Sequence[Record]) -> None:
    """Prints the ratios of perplexity, KL divergences and retrieval."""
    table = Table("text", "method", "sparsity", "perplexity", "95 %", "KL", "retrieval")
    for record in records:
        found = {(e["test"], e["part"]): e for e in record["results"]}
        ratio, kl = found[PERPLEXITY, "all positions"], found[KL, "truncated prefixes"]
        points = found.get((RETRIEVAL, "all kinds"))
        table.add_row(
            record["setting"],
            record["method"],
            f"{record['sparsity']:.3f}",
            f"{ratio['change']:.4f}",
            f"{ratio['low']:.4f} to {ratio['high']:.4f}",
            f"{kl['change']:.4f}",
            f"{points['change']:+.1f}" if points else "",
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark on the demo's model."""
    args = _parser().parse_args(argv)
    assets = prepare()
    demo = Domain(PYTHON, assets.calibration_file, assets.prompt_file)
    domains = [demo if text == PYTHON else _domain(text) for text in args.texts]
    profiles = _profiles(args.profile, {domain.name for domain in domains})
    settings = [Setting(domain, domain) for domain in domains]
    if len(domains) > 1:
        settings.append(Setting(domains[1], domains[0]))
    plan = Plan(
        str(assets.model_dir),
        Amounts(args.length, args.windows, args.prefixes, 0, 1, 0),
        args.per_task,
        tuple(args.retrieval_sparsities),
        tuple(args.sparge_tolerances),
        min(args.sparge_length, args.length),
    )
    model = open_model(plan.model)
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        header = {**asdict(plan), "texts": args.texts, "profiles": profiles}
        journal = Journal(work / FILE_NAME, _as_json(header))
        runner = Runner(model)
        records: list[Record] = []
        for setting in settings:
            bench = Bench(plan, setting, model, runner, journal)
            ours = profiles.get(setting.calibration.name, []) + profiles.get(ANY, [])
            candidates = _candidates(bench, ours, args)
            for record in bench.run(candidates, args.sparsities):
                records.append(record)
                if args.output:
                    write_rows(args.output, rows_of(records, args.length))
    show(records)


def _candidates(bench: Bench, ours: Sequence[str], args: argparse.Namespace) -> Candidates:
    """The methods of a setting by name, those that are asked for."""
    methods = [*baselines(), *(variants() if args.variants else ())]
    candidates = {method.name: [method] for method in methods}
    if ours:
        candidates[OURS] = [of_profile(OURS, load_profile(path), min_length=0) for path in ours]
    wanted = args.methods or [*candidates, THEIRS]
    if THEIRS in wanted:
        candidates[THEIRS] = bench.tuned_by_spargeattn()
    return {name: each for name, each in candidates.items() if name in wanted}


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[PYTHON],
        metavar="TEXT",
        help=f"{PYTHON!r} for the demo's, or NAME=CALIBRATION,MEASURED: two files",
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME=PROFILE",
        help=f"a profile tuned on the text of that name, or with {ANY!r} for all texts; may be "
        "given several times",
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these, by name")
    parser.add_argument("--variants", action="store_true", help="variants of the selector too")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=2, help="of text, for perplexity")
    parser.add_argument("--prefixes", type=int, default=8, help="scored by one token each")
    parser.add_argument("--per-task", type=int, default=3, help="retrieval prompts of a task")
    parser.add_argument("--retrieval-sparsities", type=float, nargs="*", default=[0.7])
    parser.add_argument("--sparge-tolerances", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--sparge-length", type=int, default=4096)
    parser.add_argument(
        "--work", type=Path, help="folder for what was measured, which another run goes on from"
    )
    return parser


def _domain(text: str) -> Domain:
    name, _, files = text.partition("=")
    calibration, _, measured = files.partition(",")
    if not (name and calibration and measured):
        raise SystemExit(f"--texts: {text}: NAME=CALIBRATION,MEASURED expected")
    return Domain(name, Path(calibration), Path(measured))


def _profiles(given: Sequence[str], texts: set[str]) -> dict[str, list[str]]:
    profiles: dict[str, list[str]] = {}
    for each in given:
        name, _, path = each.partition("=")
        if name not in texts | {ANY} or not path:
            names = ", ".join(sorted(texts | {ANY}))
            raise SystemExit(f"--profile: {each}: NAME=PROFILE expected, NAME one of {names}")
        profiles.setdefault(name, []).append(path)
    return profiles


def _as_json(values: Mapping[str, Any]) -> Record:
    """With lists for tuples, as it will be read back."""
    return {
        name: _as_json(each)
        if isinstance(each, Mapping)
        else list(each)
        if isinstance(each, tuple)
        else each
        for name, each in values.items()
    }


if __name__ == "__main__":
    main()
