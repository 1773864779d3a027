"""One setting of the benchmark: methods set on one text and measured on another."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.domains import Domain
from benchmarks.tuner_arms.arms import swept
from benchmarks.tuner_arms.sweeps import spargeattn
from vllm_afbs.captures import CALIBRATION
from vllm_afbs.evaluate.baselines import Tuned
from vllm_afbs.evaluate.comparison import compare
from vllm_afbs.evaluate.in_process import InProcess, Runner
from vllm_afbs.evaluate.matching import knob_at, settle
from vllm_afbs.evaluate.methods import BLOCK, Method, Selection
from vllm_afbs.evaluate.suite import Amounts, Answers, Suite, ask, make_suite
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import SourceModel
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.journal import Journal
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import Text, read_texts
from vllm_afbs.tuning.windows import cut_windows


@dataclass(frozen=True)
class Setting:
    """The texts that methods are set on and measured on.

    Attributes:
        calibration: The kind of text whose calibration part sets them.
        measured: The kind of text whose other part measures them.
        retrieves: Whether facts hidden in it are asked for, too.
    """

    calibration: Domain
    measured: Domain
    retrieves: bool = False

    @property
    def name(self) -> str:
        """Name in the results."""
        own = self.calibration.name == self.measured.name
        return self.measured.name if own else f"{self.measured.name} by {self.calibration.name}"


@dataclass(frozen=True)
class Plan:
    """What all settings share; a journal of another plan is refused.

    Attributes:
        model: The model's directory.
        amounts: How much is asked about texts.
        per_kind: Retrieval prompts of each kind.
        retrieval: The sparsities at which retrieval is measured.
        tolerances: Tolerances of SpargeAttn's tuner.
        sparge_length: Tokens of the text that SpargeAttn's tuner uses.
    """

    model: str
    amounts: Amounts
    per_kind: int
    retrieval: tuple[float, ...]
    tolerances: tuple[float, ...]
    sparge_length: int


Record = dict[str, Any]
"""What is kept of a measurement, as JSON values."""
Candidates = dict[str, list[Method]]
"""Methods by the name of the result that one of them gives."""


class Bench:
    """One setting: its texts, and the methods that are compared on them.

    Args:
        plan: What all settings share.
        setting: The setting.
        model: The model.
        runner: The loaded model.
        journal: The journal that keeps finished steps.
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
        """Measures every method at every sparsity; yields each record as soon as it is there."""
        levels = self._levels(candidates, sparsities)
        for name, methods in candidates.items():
            for sparsity in sparsities:
                yield self._measured(name, methods, levels, sparsity)
            for method in methods:
                if method.given is not None:
                    alone = partial(self._figures, Selection(method, method.given), None)
                    full = name if name == method.name else f"{name}, {method.name}"
                    yield self._step(f"{full}, as given", method.name, alone)

    def tuned_by_spargeattn(self) -> list[Method]:
        """Runs SpargeAttn's tuner on the calibration text, at every tolerance."""
        methods: list[Method] = []
        for tolerance in self._plan.tolerances:
            record = self._journal.step(
                f"{self._setting.calibration.name}: SpargeAttn's tuner, {tolerance}",
                Record,
                partial(self._sparge, tolerance),
            )
            thresholds = {
                layer: HeadThresholds(torch.tensor(tau), torch.tensor(theta))
                for layer, (tau, theta) in enumerate(record["thresholds"])
            }
            methods.append(Tuned(f"tolerance {tolerance}", given=0.0, thresholds=thresholds))
        return methods

    def _sparge(self, tolerance: float) -> Record:
        length = self._plan.sparge_length
        settings = SearchSettings([length // 2, length], tolerance, BLOCK, BLOCK, seed=0)
        cut = cut_windows(
            self._model.tokenizer(), read_texts([self._setting.calibration.calibration]), length
        )
        layers = range(self._model.fingerprint.num_layers)
        windows = {CALIBRATION: cut.windows[CALIBRATION]}
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            taken = capture(
                self._model,
                TransformersEngine(self._model),
                windows,
                layers,
                Path(folder),
                lambda _: None,
            )
            found = swept(spargeattn)(settings, layers, taken)
        return {"thresholds": [[each.tau.tolist(), each.theta.tolist()] for each in found]}

    def _levels(
        self, candidates: Candidates, sparsities: Sequence[float]
    ) -> dict[int, list[torch.Tensor]]:
        """Takes levels from a dense run, by ``id`` of the methods that are not yet measured."""
        methods = [
            method
            for name, each in candidates.items()
            if any(
                self._key(f"{name} at {s}", _names(each)) not in self._journal for s in sparsities
            )
            for method in each
        ]
        found = self._runner.levels(self._matched, methods) if methods else []
        return {id(method): each for method, each in zip(methods, found, strict=True)}

    def _measured(
        self,
        name: str,
        methods: Sequence[Method],
        levels: Mapping[int, list[torch.Tensor]],
        sparsity: float,
    ) -> Record:
        def compute() -> Record:
            # A tuned method's knob says how far its thresholds are moved. Others have no rival.
            method = min(methods, key=lambda each: abs(knob_at(levels[id(each)], sparsity)))
            dense = levels[id(method)]
            selection = settle(self._runner, self._matched, method, dense, sparsity)
            return self._figures(selection, sparsity)

        return self._step(f"{name} at {sparsity}", _names(methods), compute)

    def _step(self, name: str, of: str, compute: Callable[[], Record]) -> Record:
        key = self._key(name, of)
        known = key in self._journal
        record = self._journal.step(key, Record, compute)
        if not known:
            print(
                f"{self._setting.name}: {name}: sparsity {record['sparsity']:.3f}, "
                f"{self._journal.entry(key).seconds:.1f} s",
                flush=True,
            )
        return {**record, "setting": self._setting.name, "method": name}

    def _key(self, name: str, of: str) -> str:
        return f"{self._setting.name}: {name} ({of})"

    def _figures(self, selection: Selection, sparsity: float | None) -> Record:
        suite, dense = self._on_text
        answers = ask(InProcess(self._runner, selection), suite)
        found = compare(suite, dense, answers)
        if self._setting.retrieves and sparsity in self._plan.retrieval:
            suite, dense = self._on_facts
            found += compare(suite, dense, ask(InProcess(self._runner, selection), suite))
        return {
            "knob": max(min(selection.knob, 1e300), -1e300),
            "sparsity": answers.sparsity,
            "results": [asdict(each) for each in found],
        }

    @cached_property
    def _tokenizer(self) -> Any:
        return self._model.tokenizer()

    @property
    def _matched(self) -> Sequence[list[int]]:
        """The windows on which methods are set to one sparsity: those that are measured.

        This sets one number, in the same way for all methods. Thresholds stay as calibrated.
        """
        return self._on_text[0].windows

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


def _names(methods: Sequence[Method]) -> str:
    return ", ".join(method.name for method in methods)
