"""Levels of a profile, and profiles that were written before there were levels."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.profiles import SMALL_MODEL, uniform_profile
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile, parse_profile
from vllm_afbs.profile.schema import (
    HeadProfile,
    LayerLevel,
    LayerProfile,
    LengthEstimate,
    Level,
    Measurement,
    Profile,
)
from vllm_afbs.profile.tuner_run import WholeModel

OLDER = Path(__file__).parent / "older_profiles"
"""Written by the last commit that wrote each version."""

OLDER_IDS = {2: "05cccff65738", 3: "978558efd39a"}
"""As that commit computed them."""

NUM_HEADS = SMALL_MODEL.num_heads
SHARES = st.floats(0, 0.99)
LENGTHS = st.lists(st.integers(1, 10**6), unique=True, max_size=4).map(sorted)
NAMES = st.from_regex(r"\A[a-z0-9][a-z0-9.-]{0,31}\Z")
HEADS = st.builds(
    HeadProfile,
    tau=st.floats(0.01, 1),
    theta=st.floats(-1, 1),
    calibration=SHARES.map(lambda each: [Measurement(length=8192, error=0.05, sparsity=each)]),
    validation=st.none(),
)
TOLERANCES = st.none() | st.floats(0.001, 1)
WHOLE_MODELS = st.builds(
    WholeModel,
    sparsity=SHARES,
    kl=st.floats(0, 10),
    perplexity=st.floats(1, 1e6),
    dense_perplexity=st.floats(1, 1e6),
)
ESTIMATES = st.builds(
    LengthEstimate,
    length=st.just(1),
    sparsity=SHARES,
    attention_time_ratio=st.none() | st.floats(0.01, 2),
)


@st.composite
def estimates(draw: st.DrawFn) -> list[LengthEstimate]:
    return [draw(ESTIMATES).model_copy(update={"length": length}) for length in draw(LENGTHS)]


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Profiles of one to eight levels, some of whose layers have no full attention."""
    names = draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    layer_levels = st.builds(
        LayerLevel,
        heads=st.lists(HEADS, min_size=NUM_HEADS, max_size=NUM_HEADS),
        tolerance=TOLERANCES,
    )
    layers = st.builds(
        LayerProfile,
        levels=st.lists(layer_levels, min_size=len(names), max_size=len(names)),
    )
    fields: dict[str, Any] = {
        "levels": [
            Level(
                name=name,
                tolerance=draw(TOLERANCES),
                whole_model=draw(st.none() | WHOLE_MODELS),
                by_length=draw(estimates()),
            )
            for name in names
        ],
        "default_level": draw(st.sampled_from(names)),
        "layers": [draw(layers), draw(layers | st.just(LayerProfile(levels=[])))],
    }
    return uniform_profile(**fields)


ADAPTER = {"name": "one", "sha256": "a" * 64, "levels": [{"kl": 0.01, "holds": True}]}


def test_adapters_are_read_and_change_the_id() -> None:
    data = json.loads(uniform_profile().to_json())
    assert "adapters" not in data  # profiles without keep their ids
    other = ADAPTER | {"sha256": "b" * 64, "levels": [{"kl": 0.02, "holds": False}]}
    profile = parse_profile(json.dumps(data | {"adapters": [ADAPTER, other]}).encode(), "p.json")
    assert profile.validated_adapters(0) == {"a" * 64}
    assert profile.profile_id != uniform_profile().profile_id
    assert parse_profile(profile.to_json().encode(), "p.json") == profile
    assert parse_profile(json.dumps(data).encode(), "p.json").validated_adapters(0) == set()


@pytest.mark.parametrize(
    ("adapters", "line"),
    [
        ({}, "adapters: Input should be a valid array"),
        ([ADAPTER | {"sha256": "A" * 64}], "adapters.0.sha256: String should match"),
        ([ADAPTER | {"path": "x"}], "adapters.0.path: Extra inputs are not permitted"),
        ([ADAPTER | {"levels": [{"kl": -1.0, "holds": True}]}], "adapters.0.levels.0.kl: "),
        ([ADAPTER | {"levels": [{"kl": 0.1, "holds": 1}]}], "adapters.0.levels.0.holds: "),
        (
            [ADAPTER | {"levels": []}],
            "Value error, adapters.0.levels: 1 expected, one for each of levels, got 0",
        ),
        (
            [ADAPTER, ADAPTER | {"name": "two"}],
            "Value error, adapters.1.sha256: another digest expected, adapters.0 has this one",
        ),
    ],
)
def test_adapters_are_checked(adapters: Any, line: str) -> None:
    data = json.loads(uniform_profile().to_json()) | {"adapters": adapters}
    with pytest.raises(ProfileError, match=f"^p.json: {line}"):
        parse_profile(json.dumps(data).encode(), "p.json")


@given(profiles())
def test_any_levels_are_read_as_they_were_written(profile: Profile) -> None:
    read = parse_profile(profile.to_json().encode(), "p.json")
    assert read == profile
    assert read.profile_id == profile.profile_id
    assert json.loads(profile.to_json())["schema_version"] == 4


@given(profiles())
def test_a_level_is_found_by_its_name(profile: Profile) -> None:
    names = [level.name for level in profile.levels]
    assert [profile.level_index(name) for name in names] == list(range(len(names)))
    assert names[profile.level_index()] == profile.default_level
    with pytest.raises(ProfileError) as refused:
        profile.level_index("Unknown")
    assert f"level: one of {', '.join(names)} expected, got 'Unknown'" in str(refused.value)


@given(profiles())
def test_heads_and_tolerances_are_those_of_the_level(profile: Profile) -> None:
    full = [layer for layer in profile.layers if layer.levels]
    for level in range(len(profile.levels)):
        heads = [head for layer in full for head in layer.levels[level].heads]
        assert profile.heads_of(level) == heads
        for index in profile.full_layers:
            candidates = [
                profile.layers[index].levels[level].tolerance,
                profile.levels[level].tolerance,
                profile.tuner.tolerance,
            ]
            given_ = [each for each in candidates if each is not None]
            assert profile.tolerance_of(index, level) == given_[0]


@given(profiles(), st.data())
def test_other_thresholds_are_another_profile(profile: Profile, data: st.DataObject) -> None:
    layer = data.draw(st.sampled_from(profile.full_layers))
    level = data.draw(st.sampled_from(range(len(profile.levels))))
    changed = json.loads(profile.to_json())
    head = changed["layers"][layer]["levels"][level]["heads"][3]
    head["tau"] = 0.5 if head["tau"] != 0.5 else 0.25
    other = parse_profile(json.dumps(changed).encode(), "p.json")
    assert other.profile_id != profile.profile_id


def _levels(*names: str) -> Any:
    return [{"name": name} for name in names]


ESTIMATE = {"length": 8, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("levels", [], "levels: List should have at least 1 item"),
        ("levels", _levels("tuned", "fast"), "layers.0.levels: 2 expected, one for each of levels"),
        ("levels", _levels("tuned", "tuned"), "levels.1.name: another name expected, 'tuned' is"),
        ("levels", _levels("Tuned"), "levels.0.name: "),
        ("levels", _levels("a\n"), "levels.0.name: "),
        ("levels", _levels("-a"), "levels.0.name: "),
        ("levels", _levels("a" * 33), "levels.0.name: "),
        ("levels", [{"name": "tuned", "tolerance": 0.0}], "levels.0.tolerance: "),
        ("levels", [{"name": "tuned", "by_length": [ESTIMATE] * 2}], "levels.0: Value error, by_"),
        ("default_level", "fast", "default_level: one of tuned expected, got 'fast'"),
        ("upgraded_from", 1, "upgraded_from: "),
        ("upgraded_from", 4, "upgraded_from: "),
    ],
)
def test_wrong_levels_are_named(field: str, value: Any, named: str) -> None:
    data = json.loads(uniform_profile().to_json()) | {field: value}
    with pytest.raises(ProfileError) as refused:
        parse_profile(json.dumps(data).encode(), "p.json")
    assert named in str(refused.value)


@pytest.mark.parametrize("version", OLDER_IDS)
def test_an_older_profile_is_one_level_and_keeps_its_id(version: int, tmp_path: Path) -> None:
    path = OLDER / f"version_{version}.json"
    older = json.loads(path.read_text(encoding="utf-8"))
    profile = load_profile(path)
    assert profile.profile_id == OLDER_IDS[version]
    assert [level.name for level in profile.levels] == [profile.default_level] == ["tuned"]
    for before, now in zip(older["layers"], profile.layers, strict=True):
        for head in before["heads"]:
            assert head.pop("lambda_") is None
        assert [level.model_dump() for level in now.levels] == ([before] if before["heads"] else [])
    assert profile.levels[0].tolerance == older["tuner"]["tolerance"]
    budget = profile.tuner.budget
    assert profile.levels[0].whole_model == (budget and budget.allocated)
    # Two of the six heads are dense in version 2, one of the four in version 3.
    means = {2: (0.125, 0.3125), 3: (0.1875, 0.46875)}[version]
    by_length = [(each.length, each.sparsity) for each in profile.levels[0].by_length]
    assert by_length == [(1024, means[0]), (8192, means[1])]
    again = tmp_path / "again.json"
    again.write_text(profile.to_json(), encoding="utf-8")
    assert json.loads(again.read_text(encoding="utf-8"))["schema_version"] == 4
    assert load_profile(again) == profile
    assert load_profile(again).profile_id == OLDER_IDS[version]


def test_an_older_id_is_no_cover_for_other_levels() -> None:
    profile = load_profile(OLDER / "version_3.json")
    changed = json.loads(profile.to_json())
    changed["levels"][0]["whole_model"]["kl"] = 0.0
    with pytest.raises(ProfileError, match="upgraded_from: to be left out where levels are not"):
        parse_profile(json.dumps(changed).encode(), "p.json")
    other = profile.layers[0].levels[0].heads[0].model_copy(update={"tau": 0.5})
    layers = [LayerProfile(levels=[LayerLevel(heads=[other] * 2)]), *profile.layers[1:]]
    assert profile.model_copy(update={"layers": layers}).profile_id != profile.profile_id


@pytest.mark.parametrize(
    ("version", "layer", "value", "named"),
    [
        (2, 1, {"heads": []}, r"layers\.1\.heads: 2 expected by model\.num_heads, got 0"),
        (3, 0, {"heads": [{"tau": 1.0, "theta": 0.0}]}, r"layers\.0\.heads: 2 expected by"),
        (3, 0, {"heads": [{"tau": 2.0, "theta": 0.0}]}, r"layers\.0\.heads\.0\.tau: "),
        (3, 1, {"heads": [], "tolerance": 0.5}, r"layers\.1\.tolerance: null expected"),
        (3, 1, {"levels": []}, r"layers\.1\.heads: Field required"),
    ],
)
def test_an_older_profile_is_refused_in_its_own_terms(
    version: int, layer: int, value: Any, named: str
) -> None:
    data = json.loads((OLDER / f"version_{version}.json").read_text(encoding="utf-8"))
    data["layers"][layer] = value
    with pytest.raises(ProfileError, match=named):
        parse_profile(json.dumps(data).encode(), "p.json")


def test_a_lambda_is_refused_in_every_version() -> None:
    """Nothing serves it: it would save next to nothing (``benchmarks.lambda_savings``)."""
    for text in (OLDER / "version_3.json").read_text(), uniform_profile(tau=0.5).to_json():
        data = json.loads(text)
        first = data["layers"][0]
        heads = first["levels"][0]["heads"] if "levels" in first else first["heads"]
        heads[0]["lambda_"] = -4.0
        with pytest.raises(ProfileError, match=r"layers\.0\..*heads\.0\.lambda_: .*null"):
            parse_profile(json.dumps(data).encode(), "profile.json")
