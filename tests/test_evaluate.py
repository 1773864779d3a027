"""Evaluating a model: masking, decoding, retrieval prompts, intervals and the command line."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.profiles import uniform_profile
from tests.problems import SCALE, make_problem
from tests.profiles import of_levels
from tests.tuning_jobs import IN_PROCESS
from vllm_afbs.evaluate.__main__ import main
from vllm_afbs.evaluate.baselines import UniformTau, of_profile
from vllm_afbs.evaluate.bootstrap import bootstrap_means, interval
from vllm_afbs.evaluate.comparison import Comparison, buckets, worst
from vllm_afbs.evaluate.in_process import Counter, InProcess, Runner
from vllm_afbs.evaluate.matching import settle
from vllm_afbs.evaluate.methods import Selection
from vllm_afbs.evaluate.prompts import make_prompts
from vllm_afbs.evaluate.retrieval import KINDS, Maker
from vllm_afbs.files import write_atomically
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.kernels.reference import reference_attention, reference_select
from vllm_afbs.models.in_process.engine import EndToEnd
from vllm_afbs.models.in_process.masked import masked_attention
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.tuner_run import TextSource
from vllm_afbs.tuning.texts import Text

BLOCK = 16
TOKENS = [(5 * i) % 60 for i in range(256)]
METHOD = UniformTau("one tau", BLOCK, BLOCK)


@pytest.fixture(scope="module")
def runner(tiny_model: Path) -> Runner:
    return Runner(open_model(str(tiny_model)))


@pytest.fixture(scope="module")
def profile(tiny_model: Path) -> Profile:
    """One tau for layer 1, layer 0 left dense."""
    shape = open_model(str(tiny_model)).fingerprint
    blocks = {"block_q": BLOCK, "block_k": BLOCK}
    sparse = uniform_profile(shape, 0.6, 0.5, [128, 256], **blocks)
    dense = uniform_profile(shape, 1.0, 0.0, [128, 256], **blocks)
    return sparse.model_copy(update={"layers": [dense.layers[0], sparse.layers[1]]})


@pytest.mark.parametrize("entries", [1, 1 << 24], ids=["block by block", "at once"])
def test_masked_attention_is_the_specification(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_afbs.models.in_process.masked._MASK_ENTRIES", {"cpu": entries})
    problem = make_problem(149, 149, BLOCK, BLOCK // 2)
    args = problem.query, problem.key
    keep = reference_select(*args, problem.thresholds, problem.geometry, SCALE)
    expected, _ = reference_attention(*args, problem.value, keep, problem.geometry, SCALE)
    heads = [each.transpose(0, 1)[None] for each in (*args, problem.value)]
    query, key, value = heads
    output = masked_attention(query, key, value, keep, problem.geometry, SCALE)
    torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, atol=1e-5, rtol=1e-4)


def test_a_dropped_block_may_count_as_its_mean() -> None:
    """Where a block's keys and values are all the same, its mean loses nothing."""
    problem = make_problem(96, 96, BLOCK, BLOCK)
    key, value = (
        rows[::BLOCK].repeat_interleave(BLOCK, 0) for rows in (problem.key, problem.value)
    )
    geometry = problem.geometry
    nothing = geometry.always.expand(4, -1, -1)
    everything = geometry.visible.expand(4, -1, -1)
    expected, _ = reference_attention(problem.query, key, value, everything, geometry, SCALE)
    heads = [each.transpose(0, 1)[None] for each in (problem.query, key, value)]
    query, key, value = heads
    output = masked_attention(query, key, value, nothing, geometry, SCALE, corrects=True)
    torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, atol=1e-5, rtol=1e-4)
    plain = masked_attention(query, key, value, nothing, geometry, SCALE)
    assert not torch.allclose(plain, output, atol=1e-2)


def test_batched_answers_are_those_of_prompts_alone(runner: Runner) -> None:
    """Each token decoded with the whole prompt's attention, sparse ones' prefill sparse."""
    prompts = [TOKENS[:100], TOKENS[7:150], TOKENS[3:200]]
    alone = [runner.generate([prompt], 6)[0] for prompt in prompts]
    assert runner.generate(prompts, 6) == alone
    for prompt, answer in zip(prompts, alone, strict=True):
        for at, token in enumerate(answer):
            predicted = runner.next_token(prompt + answer[:at], token)
            assert predicted.loss == pytest.approx(-math.log(max(predicted.top.values())), abs=1e-4)
    sparse = InProcess(runner, Selection(METHOD, 0.3)).generate(prompts, 6)
    assert sparse != alone


def test_losses_and_the_next_token_agree(runner: Runner) -> None:
    predictor = InProcess(runner, Selection(METHOD, 0.5))
    losses = predictor.losses(TOKENS)
    assert losses.shape == (255,)
    dense = InProcess(runner, None)
    assert not torch.allclose(dense.losses(TOKENS), losses)
    # Whatever follows, dense rows do not change; sparse ones of the same block do.
    assert dense.next_tokens([(TOKENS[:100], TOKENS[100])])[0].loss == pytest.approx(
        float(dense.losses(TOKENS)[99]), abs=1e-4
    )
    (last,) = predictor.next_tokens([(TOKENS[:-1], TOKENS[-1])])
    assert last.log_probs is not None
    assert last.loss == pytest.approx(-float(last.log_probs[TOKENS[-1]]))
    assert dense.sparsity() == 0.0
    assert 0.2 < predictor.sparsity() < 0.9


def test_a_knob_is_settled_on_a_model_that_is_sparse_already(runner: Runner) -> None:
    (levels,) = runner.levels([TOKENS], [METHOD])
    selection = settle(runner, [TOKENS], METHOD, levels, 0.5)
    counter = Counter()
    with runner.selecting(selection, counter):
        runner.losses(TOKENS)
    assert counter.sparsity == pytest.approx(0.5, abs=0.02)


def test_a_profile_runs_as_the_server_plans_it(
    runner: Runner, profile: Profile, tiny_model: Path
) -> None:
    """As the tuner's own runner of whole models, which is tested against the specification."""
    method = of_profile("tuned", profile)
    sparse = InProcess(runner, Selection(method, 0.0))
    losses = sparse.losses(TOKENS)
    served = profile.level_index()
    heads = {
        index: HeadThresholds.of(layer.levels[served].heads)
        for index, layer in enumerate(profile.layers)
        if layer.levels[served].is_sparse
    }
    assert heads
    expected = EndToEnd(open_model(str(tiny_model)), BLOCK, BLOCK).predict(TOKENS, heads)
    targets = expected.log_probs.gather(1, expected.targets[:, None])[:, 0]
    torch.testing.assert_close(losses, -targets, atol=1e-4, rtol=1e-4)
    assert 0.1 < sparse.sparsity() < 0.5
    short = InProcess(runner, Selection(method, 0.0))
    short.losses(TOKENS[:127])
    assert short.sparsity() == 0.0


TEXT = " ".join(
    f"The {word} of the {other} was {word}ing without any {other}ness at all."
    for word in ("garden", "harbour", "mountain", "picture", "window", "letter")
    for other in ("kettle", "wagon", "bridge", "candle", "orchard", "lantern")
)


class Words:
    """A tokenizer whose tokens are words."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=text.split())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_retrieval_prompt_holds_its_answers(kind: str) -> None:
    prompts = make_prompts(Words(), TEXT, 900, 5, seed=1, kinds=[kind])
    again = make_prompts(Words(), TEXT, 900, 5, seed=1, kinds=[kind])
    assert prompts == again
    assert [prompt.depth for prompt in prompts] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for prompt in prompts:
        room = 900 - prompt.num_tokens
        assert 0.9 * room < len(prompt.tokens) <= room
        text = " ".join(map(str, prompt.tokens))
        assert all(answer in text for answer in prompt.answers)
        assert prompt.score(" and ".join(prompt.answers).upper()) == 1.0
        assert prompt.score("nothing") == 0.0
        assert prompt.score(prompt.answers[0]) == pytest.approx(1 / len(prompt.answers))
        assert not any(answer in text.split("?")[-1] for answer in prompt.answers) or (
            kind == "variable tracking"
        )


@pytest.mark.parametrize("kind", ["passkey", "needle", "multi-key needle"])
def test_a_fact_lies_at_its_depth(kind: str) -> None:
    for prompt in make_prompts(Words(), TEXT, 900, 5, seed=1, kinds=[kind]):
        at = [i for i, word in enumerate(prompt.tokens) if prompt.answers[0] in str(word)]
        assert at[0] / len(prompt.tokens) == pytest.approx(prompt.depth, abs=0.06)


def test_only_the_asked_key_answers_and_chains_are_in_order() -> None:
    maker = Maker(TEXT, 900, seed=0)
    task = maker.multi_key(0.5)
    (asked,) = task.answers
    assert sum(asked in fact for _, fact in task.facts) == 1
    assert len(task.facts) == 4
    chain = maker.variable_tracking(0.2)
    links = [fact for _, fact in chain.facts]
    assert links[0].startswith(f"VAR {chain.answers[0]} = ")
    for before, name, link in zip(chain.answers, chain.answers[1:], links[1:], strict=False):
        assert link == f"VAR {name} = VAR {before}."
    assert len(maker.multi_value(0.0).answers) == len(set(maker.multi_value(0.0).answers)) == 4


def test_common_and_frequent_words_are_the_most_frequent() -> None:
    maker = Maker(TEXT, 900, seed=0)
    for task, units in ((maker.common_words(0.0), 20), (maker.frequent_words(0.0), 400)):
        words = [unit.split()[-1] for unit in task.fill(units)]
        counts = {word: words.count(word) for word in set(words)}
        ordered = sorted(counts, key=lambda word: -counts[word])
        assert set(ordered[: len(task.answers)]) == set(task.answers)


def test_intervals_of_a_known_case() -> None:
    """Means of n draws of a normal variable spread by 1 / sqrt(n)."""
    values = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    replicates = bootstrap_means(values.tolist())
    low, high = interval(replicates)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert interval(bootstrap_means([0.25] * 10)) == (0.25, 0.25)


def comparison(part: str, change: float, test: str = "retrieval") -> Comparison:
    return Comparison(
        test, part, "points", 50, 50 + change, change, change - 1, change + 1, 9, False
    )


def test_the_worst_task_is_a_task() -> None:
    found = [comparison("needle", -1.0), comparison("passkey", -4.0), comparison("depth 0 %", -9.0)]
    assert worst(found) is found[1]
    assert worst([comparison("continuations", -5.0, "greedy agreement")]) is None
    assert found[1].is_significant
    assert not comparison("needle", -0.5).is_significant
    assert buckets(8192) == [(1, 2048), (2048, 4096), (4096, 8192)]
    assert buckets(1000) == [(1, 1000)]


@pytest.fixture(scope="module")
def profile_file(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    write_atomically(path, profile.to_json())
    return path


def arguments(model: Path, profile: Path, output: Path, *more: str) -> list[str]:
    tests = ["--tests", "perplexity", "prefixes", "agreement"]
    few = ["--windows", "2", "--prefixes", "3", "--continuations", "2", "--new-tokens", "4"]
    where = ["--model", str(model), "--profile", str(profile), "--output", str(output), *IN_PROCESS]
    return [*where, *tests, *few, *more]


def test_a_level_is_evaluated_with_its_own_thresholds(
    tiny_model: Path, profile: Profile, tmp_path: Path
) -> None:
    shape = profile.model
    sparser = uniform_profile(shape, 0.3, 0.7, [128, 256], block_q=BLOCK, block_k=BLOCK)
    file = tmp_path / "profile.json"
    write_atomically(file, of_levels({"slow": profile, "fast": sparser}, "slow").to_json())
    found = {}
    for name, more in (("slow", []), ("fast", ["--level", "fast"])):
        output = tmp_path / f"{name}.json"
        assert main([*arguments(tiny_model, file, output, *more), "--tests", "perplexity"]) == 0
        found[name] = json.loads(output.read_text())
        assert found[name]["level"] == name
    assert found["slow"]["sparsity"] < found["fast"]["sparsity"]
    assert found["slow"]["profile_id"] == found["fast"]["profile_id"]


def test_the_command_line_writes_json_csv_and_a_picture(
    tiny_model: Path, profile_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "quality.json"
    assert main(arguments(tiny_model, profile_file, output)) == 0
    content = json.loads(output.read_text())
    results = {(each["test"], each["part"]): each for each in content["results"]}
    ratio = results["perplexity", "all positions"]
    assert ratio["change"] == pytest.approx(ratio["sparse"] / ratio["dense"])
    assert ratio["low"] <= ratio["change"] <= ratio["high"]
    assert results["KL to dense", "truncated prefixes"]["change"] >= (
        results["KL to dense, top 20", "truncated prefixes"]["change"] - 1e-6
    )
    assert content["worst_task"] is None
    assert 0.0 < content["sparsity"] < 1.0
    with output.with_suffix(".csv").open() as file:
        rows = {row["what"]: float(row["p50"]) for row in csv.DictReader(file)}
    assert rows["perplexity, all positions: sparse / dense"] == pytest.approx(ratio["change"], 1e-4)
    assert output.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_what_cannot_be_used_is_refused_with_one_line(
    tiny_model: Path,
    profile_file: Path,
    profile: Profile,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "quality.json"
    other = tmp_path / "other.json"
    model = profile.model.model_copy(update={"head_dim": 96})
    other.write_text(profile.model_copy(update={"model": model}).to_json())
    longer = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    stretched = tmp_path / "stretched.json"
    model = open_model(str(tiny_model), overrides=longer).fingerprint
    stretched.write_text(profile.model_copy(update={"model": model}).to_json())
    overrides = ("--hf-overrides", json.dumps(longer))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    seen = tmp_path / "seen.txt"
    seen.write_text("seen " * 100)
    tuned = [
        TextSource(name=name, sha256=Text("", seen.read_text()).sha256, num_tokens=9)
        for name in ("seen.txt", "pydoc_data.topics of Python 3")
    ]
    on_it = tmp_path / "tuned.json"
    on_it.write_text(profile.model_copy(update={"calibration_texts": tuned}).to_json())
    url = "http://127.0.0.1:9"
    for given, complaint in (
        (arguments(tiny_model, tmp_path / "none.json", output), "none.json: cannot read"),
        (arguments(tmp_path / "none", profile_file, output), "none: no such directory"),
        (arguments(tiny_model, other, output), "model.head_dim is 96"),
        (arguments(tiny_model, stretched, output), "model.rope."),
        (arguments(tiny_model, stretched, output, *overrides, "--length", "4"), "--length: 128 to"),
        (arguments(tiny_model, profile_file, output, "--text", str(short)), "short.txt: the text"),
        (arguments(tiny_model, on_it, output, "--text", str(seen)), "seen.txt: a held-out text"),
        (arguments(tiny_model, on_it, output), "--text: a text expected"),
        (arguments(tiny_model, profile_file, output, "--length", "4"), "--length: 128 to 256"),
        (arguments(tiny_model, profile_file, output, "--server", url), f"{url}: Connection"),
        (arguments(tiny_model, profile_file, tmp_path / "none" / "q.json"), "none: cannot write"),
        (arguments(tiny_model, profile_file, tmp_path), "a file expected for --output"),
        (
            arguments(tiny_model, profile_file, tmp_path / "q.csv"),
            "q.csv: a name ending in .json expected",
        ),
        (
            arguments(tiny_model, profile_file, output, "--length", "130"),
            "--length: at least 132 expected, got 130: prompts of 126 tokens would run dense",
        ),
    ):
        assert main(given) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert complaint in error[0]
    assert not output.exists()
