"""The journal: what it keeps of a step comes back as it was, and nothing else is read."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.theta_tuner.results import Attempt, Refined, ThetaTrial, Validated
from vllm_afbs.errors import InputError
from vllm_afbs.profile.schema import HeadProfile, Measurement
from vllm_afbs.tuning.journal import FORMAT_VERSION, Entry, Journal, read_entries
from vllm_afbs.tuning.search.curve import Curve

SETTINGS = {"seed": 1, "lengths": [256, 512]}
NUMBERS = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5)


@dataclass
class Counter:
    """Counts what a step says that it computed."""

    evaluations: int = 0
    cost: float = 0.0

    def reset(self) -> None:
        self.evaluations, self.cost = 0, 0.0


def theta_trial(values: list[float]) -> ThetaTrial:
    each = torch.tensor(values)
    return ThetaTrial(each, each + 1, each / 3, each * 7, 512, quantile=0.07)


def refined() -> Refined:
    ones = torch.ones(2)
    return Refined(ones, ones, ones, ones.double() / 3, error=ones.double() / 7)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def rewritten(path: Path, number: int, **fields: object) -> None:
    """Replaces fields of a line's JSON object."""
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | fields)
    path.write_text("\n".join(lines) + "\n")


@given(NUMBERS)
def test_every_bit_of_a_result_comes_back(values: list[float]) -> None:
    trial = theta_trial(values)
    found = Entry.of("s", Attempt, Attempt(trial), seconds=0.0).read(Attempt).trial
    assert found is not None
    assert (found.length, found.quantile) == (512, 0.07)
    for name in ("theta", "tau", "slope", "sparsity"):
        kept, read = getattr(trial, name), getattr(found, name)
        assert read.dtype == kept.dtype == torch.float32
        assert torch.equal(read, kept)
    doubles = torch.tensor(values, dtype=torch.float64) / 3
    result = replace(refined(), error=doubles, **dict.fromkeys(("theta", "tau", "slope"), doubles),
                     sparsity=doubles)  # fmt: skip
    read = Entry.of("s", Refined, result, seconds=0.0).read(Refined)
    assert read.error.dtype == torch.float64
    assert torch.equal(read.error, doubles)
    assert Entry.of("s", Attempt, Attempt(None), seconds=0.0).read(Attempt).trial is None


def test_a_step_is_done_once_and_its_cost_is_kept(path: Path) -> None:
    counter = Counter()
    measured = Measurement(length=512, error=0.01, sparsity=1 / 3)
    heads = Validated((HeadProfile(tau=0.9, theta=0.1, validation=measured),))

    def compute() -> Validated:
        counter.evaluations, counter.cost = 6, 1.5
        return heads

    journal = Journal(path, SETTINGS)
    assert journal.step("validate", Validated, compute, counter).heads == heads.heads
    again = Journal(path, SETTINGS)
    assert again.step("validate", Validated, pytest.fail, counter).heads == heads.heads
    assert (again.total("evaluations"), again.total("cost")) == (6, 1.5)
    assert [entry.step for entry in read_entries(path)] == ["validate"]


def test_a_step_without_finite_numbers_is_not_kept(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.step("trial", Attempt, lambda: Attempt(theta_trial([float("nan")])))
    assert read_entries(path) == []


def test_a_journal_of_an_older_format_is_refused(path: Path) -> None:
    # As written before results had a format of their own.
    lines = [{"schema_version": 5, "search_version": 3, **SETTINGS}, {"step": "a", "tau": [0.5]}]
    content = "".join(f"{json.dumps(line)}\n" for line in lines)
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        Journal(path, SETTINGS)
    assert str(refused.value).startswith(f"{path}: journal of another version of vllm-afbs: ")
    assert f"format {FORMAT_VERSION} expected, got 1; " in str(refused.value)
    assert path.read_text() == content


def test_a_journal_of_other_settings_is_refused(path: Path) -> None:
    Journal(path, SETTINGS)
    with pytest.raises(InputError, match="seed is 1 in it and 2 now; remove it to start anew"):
        Journal(path, SETTINGS | {"seed": 2})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seconds": "long"}, "line 2: a step expected: seconds: Input should be a valid number"),
        ({"tau": [0.5]}, "line 2: a step expected: tau: Unexpected"),
    ],
)
def test_a_line_of_another_shape_is_refused(
    path: Path, fields: dict[str, object], expected: str
) -> None:
    Journal(path, SETTINGS).step("refine", Refined, refined)
    rewritten(path, 1, **fields)
    with pytest.raises(InputError) as refused:
        Journal(path, SETTINGS)
    assert str(refused.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"tau": ["x", 1.0]}, "tau.0: Input should be a valid number"),
        ({"tau": 1.0}, "tau: Input should be a valid array"),
        ({"tau": [1.0, 1.0, 1.0]}, "one value per head expected, got "),
        ({"guard": 0.1}, "guard: "),
    ],
)
def test_a_result_of_another_shape_is_refused(
    path: Path, fault: dict[str, object], expected: str
) -> None:
    Journal(path, SETTINGS).step("refine", Refined, refined)
    rewritten(path, 1, result=json.loads(path.read_text().splitlines()[1])["result"] | fault)
    with pytest.raises(InputError) as refused:
        Journal(path, SETTINGS).step("refine", Refined, refined)
    message = str(refused.value)
    assert message.startswith(f"{path}: step 'refine': ")
    assert expected in message
    assert message.endswith("; remove the file to start anew")
    assert "\n" not in message


def test_a_result_of_another_kind_is_refused(path: Path) -> None:
    journal = Journal(path, SETTINGS)
    journal.step("refine", Refined, refined)
    with pytest.raises(InputError, match="step 'refine': Attempt expected, got 'Refined'"):
        journal.result("refine", Attempt)


def test_a_curve_comes_back_and_has_one_value_per_head(path: Path) -> None:
    point = torch.tensor([0.1, 1 / 3], dtype=torch.float64)
    curve = Curve((point, 2 * point), (point, point), (point, point / 7))
    found = Journal(path, SETTINGS).step("curve", Curve, lambda: curve)
    for name in ("depths", "errors", "sparsities"):
        for one, read in zip(getattr(curve, name), getattr(found, name), strict=True):
            assert torch.equal(one, read)
    kept = json.loads(path.read_text().splitlines()[1])["result"]
    rewritten(path, 1, result=kept | {"errors": [[1.0], [1.0]]})
    with pytest.raises(InputError, match="one value per head expected, got "):
        Journal(path, SETTINGS).step("curve", Curve, pytest.fail)
