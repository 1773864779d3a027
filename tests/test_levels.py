"""A profile of three levels in an engine: each answers as its thresholds do in a profile alone."""

import pytest

from tests.hybrid_engines import Run, engine, run_engines
from tests.hybrids import LENGTH
from tests.models import save_small_model
from tests.profiles import of_levels, uniform_profile
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.schema import Profile

OURS, STOCK = {"backend": "AFBS"}, {"backend": "CPU_ATTN"}
TURNS = ["fast", "exact", "fast", "middle", None, "exact"]
"""The levels of an engine that begins with ``fast``; None: the level's file is gone."""


def of_layers(*tau: float) -> Profile:
    """A profile of one level; 1 leaves a layer dense."""
    by_layer = [uniform_profile(tau=each, min_seq_len=256) for each in tau]
    layers = [profile.layers[index] for index, profile in enumerate(by_layer)]
    return by_layer[0].model_copy(update={"layers": layers})


# Each layer is dense at one level and sparse at others, in either order.
ALONE = {"exact": of_layers(0.7, 1.0), "middle": of_layers(0.6, 0.6), "fast": of_layers(1.0, 0.3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What engines of one level each did, and one of three levels, ``turned``."""
    folder = tmp_path_factory.mktemp("levels")
    model = save_small_model(folder / "model", max_position_embeddings=2 * LENGTH)
    profiles = ALONE | {"turned": of_levels(ALONE, default="exact")}
    engines = {"stock": engine(model, STOCK)}
    for name, profile in profiles.items():
        path = folder / f"{name}.json"
        write_atomically(path, profile.to_json())
        settings = {"level": "fast"} if name == "turned" else {}
        turns = TURNS if name == "turned" else []
        engines[name] = engine(model, OURS, path, settings=settings, levels=turns)
    return dict(zip(engines, run_engines(list(engines.values()), folder), strict=True))


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest of two runs' log probabilities of the same prompts."""
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def test_levels_differ_from_each_other_and_from_dense(runs: dict[str, Run]) -> None:
    names = ["stock", *ALONE]
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert difference(runs[one]["logprobs"], runs[other]["logprobs"]) > 1e-3


def test_each_turn_answers_as_a_profile_of_that_level_alone(runs: dict[str, Run]) -> None:
    answers = runs["turned"]["logprobs"]
    assert len(answers) == 2 * len(TURNS)
    for turn, level in enumerate(TURNS):
        mine = answers[2 * turn : 2 * turn + 2]
        assert difference(mine, runs[level or "fast"]["logprobs"]) <= 1e-6


def test_each_turn_is_counted_as_what_its_level_computes(runs: dict[str, Run]) -> None:
    served = [level or "fast" for level in TURNS]
    for layer in ("0", "1"):
        of_turns = [runs[level]["products"].get(layer, [0, 0]) for level in served]
        assert runs["turned"]["products"][layer] == [
            sum(each) for each in zip(*of_turns, strict=True)
        ]
    dense = sum(runs[level]["fallbacks"].get("profile_dense", 0) for level in served)
    assert runs["turned"]["fallbacks"] == {"profile_dense": dense}
    assert dense > 0


def test_the_log_has_the_level_and_one_line_for_each_change(runs: dict[str, Run]) -> None:
    log = runs["turned"]["log"]
    assert any("1 of 2 layers sparse at level fast from 256 to" in line for line in log)
    changes = [line.split(": ", 1)[1] for line in log if " is served, no longer " in line]
    assert [line.split(",")[0] for line in changes] == [
        "Level exact is served", "Level fast is served", "Level middle is served",
        "Level fast is served", "Level exact is served",
    ]  # fmt: skip
    assert [bool("is gone" in line) for line in changes] == [False, False, False, True, False]
    assert not [line for line in runs["exact"]["log"] if "level" in line]
