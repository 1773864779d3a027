"""Files that are no profile, and disks that take none: one line, and nothing half done."""

import copy
import errno
import json
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.full_disk import room_for
from tests.profiles import uniform_profile
from vllm_afbs.files import write_atomically
from vllm_afbs.profile import file as profile_file
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.file import load_profile, parse_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.tuning import journal

VALID = uniform_profile().to_json().rstrip().encode()
NUM_FUZZED = 12_000
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**30, -(10**400), 1e308, 1e-320, math.nan, math.inf,
    -math.inf, "", "1", "nan", "\n", "\x00", "\u2028", "<script>", "../../etc/passwd", "é" * 3000,
    [], {}, [[]], {"a": {}}, [None], {"": 1}, {"tau": 0.5},
]  # fmt: skip


def refusal(content: bytes) -> str | None:
    """Why a profile is refused, checked to be one line with the file's name; None if it is taken.

    Anything but ``ProfileError`` fails the test.
    """
    try:
        profile = parse_profile(content, "p.json")
    except ProfileError as error:
        message = str(error)
        assert message.startswith("p.json: ")
        assert message.isprintable()
        assert len(message) < 1100
        return message
    # What is taken can be served, shown and written again.
    assert parse_profile(profile.to_json().encode(), "p.json") == profile
    assert len(profile.profile_id) == 12
    return None


def test_no_prefix_of_a_profile_is_a_profile() -> None:
    assert refusal(VALID) is None
    for length in range(len(VALID)):
        assert refusal(VALID[:length]) is not None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value of a document."""
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


PLACES = list(places(json.loads(VALID)))


def change_a_value(draw: random.Random) -> bytes:
    """Sets, removes, renames, repeats or nests one or two values."""
    data = json.loads(VALID)
    for _ in range(draw.randint(1, 2)):
        path = draw.choice(PLACES)
        if not path:
            data = draw.choice([data, [data], copy.deepcopy(draw.choice(ODD_VALUES))])
            continue
        parent = data
        try:
            for step in path[:-1]:
                parent = parent[step]
            old = parent[path[-1]]
            parent[path[-1]] = old
        except (KeyError, IndexError, TypeError):
            continue  # the first change took it away
        kind = draw.randrange(6)
        if kind < 3:
            parent[path[-1]] = copy.deepcopy(draw.choice(ODD_VALUES))
        elif kind == 3:
            del parent[path[-1]]
        elif kind == 4 and isinstance(parent, dict):
            parent[draw.choice(["extra", "\n", "tau ", "é", "__class__"])] = old
        else:
            parent[path[-1]] = [old] * draw.randint(1, 3)
    return json.dumps(data, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def change_bytes(draw: random.Random) -> bytes:
    """Overwrites, cuts out or repeats bytes, which need not leave UTF-8 or JSON."""
    content = bytearray(VALID)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content))
        stop = min(len(content), start + draw.randint(1, 20))
        content[start:stop] = draw.choice(
            [b"", draw.randbytes(stop - start), bytes(content[start:stop]) * 2, b'"', b"{", b"\xff"]
        )
    return bytes(content)


def change_a_number(draw: random.Random) -> bytes:
    """Replaces a number's text by what JSON's readers differ about."""
    numbers = list(re.finditer(rb"(?<=[:\[ ])-?\d[\d.e+-]*", VALID))
    found = draw.choice(numbers)
    odd = [b"NaN", b"-Infinity", b"1e999", b"01", b"+1", b".5", b"1.", b"0x1", b"9" * 5000, b"-0",
           b"1e-400", b"0.9999999999999999999999"]  # fmt: skip
    return VALID[: found.start()] + draw.choice(odd) + VALID[found.end() :]


def repeat_a_key(draw: random.Random) -> bytes:
    """Gives a key twice."""
    found = draw.choice(list(re.finditer(rb'"(\w+)":', VALID)))
    return VALID[: found.start()] + found[0] + b" 1, " + VALID[found.start() :]


CHANGES: list[Callable[[random.Random], bytes]] = [
    change_a_value, change_a_value, change_a_value, change_bytes, change_a_number, repeat_a_key,
]  # fmt: skip


def test_a_fuzzed_profile_is_valid_or_refused_in_one_line() -> None:
    draw = random.Random(8)
    outcomes = {True: 0, False: 0}
    for number in range(NUM_FUZZED):
        content = CHANGES[number % len(CHANGES)](draw)
        outcomes[refusal(content) is None] += 1
    assert outcomes[False] > NUM_FUZZED / 2
    assert outcomes[True] > 50  # changed names, equal numbers: the checks let through what is fine


def in_field(path: list[Any], value: str) -> bytes:
    data = json.loads(VALID)
    target = data
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = "MARK"
    return json.dumps(data).replace('"MARK"', value).encode()


TAU = ["layers", 0, "levels", 0, "heads", 0, "tau"]
ROPE = ["model", "rope", "rope_theta"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not valid JSON"),
        (b"\xef\xbb\xbf" + VALID, "not valid JSON"),
        (VALID.decode().encode("utf-16"), "not UTF-8 text"),
        (b"[" * 100_000, "not valid JSON"),
        (in_field(ROPE, "[" * 500 + "]" * 500), "recursion limit"),
        (in_field(ROPE, "NaN"), "model.rope or tuner.settings: NaN or Infinity"),
        (in_field(["tuner", "settings"], '{"a": [Infinity]}'), "tuner.settings: NaN"),
        (in_field(TAU, "NaN"), "layers.0.levels.0.heads.0.tau: "),
        (in_field(TAU, "1e999"), "layers.0.levels.0.heads.0.tau: "),
        (in_field(TAU, '"0.5"'), "layers.0.levels.0.heads.0.tau: "),
        (in_field(TAU, "true"), "layers.0.levels.0.heads.0.tau: "),
        (in_field(TAU, '0.5, "tau": 0.9'), "'tau' appears twice in one object"),
        (in_field(TAU, '0.5, "a\\nb": 0.9'), r"layers.0.levels.0.heads.0.a\nb: "),
        (in_field(["schema_version"], '"1\\n2"'), "schema_version: 2, 3 or 4 expected, got "),
        (in_field(["min_seq_len"], "9" * 5000), "not valid JSON"),
        (in_field(["model", "num_heads"], "5"), "layers.0.levels.0.heads: 5 expected by model"),
        (in_field(["model_name"], r'"\ud800"'), "Invalid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_is_named(content: bytes, named: str) -> None:
    assert named in str(refusal(content))


def test_a_length_that_was_calibrated_twice_is_refused() -> None:
    data = uniform_profile().model_dump()
    head = data["layers"][1]["levels"][0]["heads"][2]
    head["calibration"] *= 2
    assert "layers.1.levels.0.heads.2: " in str(refusal(json.dumps(data).encode()))


def _directory(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _nothing(path: Path) -> None:
    pass


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _unreadable(path: Path) -> None:
    path.symlink_to("/proc/self/mem")  # its first byte is an error, for root as well


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, profile_file.MAX_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_directory, "regular file|Is a directory"),
        (_pipe, "a regular file expected"),
        (_device, "a regular file expected"),
        (_nothing, "No such file or directory"),
        (_loop, "Too many levels of symbolic links"),
        (_unreadable, "Input/output error"),
        (_huge, f"at most {profile_file.MAX_BYTES} bytes expected"),
    ],
)
def test_what_is_no_readable_file_is_refused(
    make: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    make(path)
    with pytest.raises(ProfileError, match=f": cannot read the profile: .*({named})"):
        load_profile(path)


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "x" * 5000, "\udcff"])
def test_an_odd_path_is_one_line(name: str) -> None:
    with pytest.raises(ProfileError, match=r"cannot read the profile|\.\.\.$") as refused:
        load_profile(name)
    assert str(refused.value).isprintable()


def test_a_link_is_read_and_written_through(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "v1.json", tmp_path / "profile.json"
    write_atomically(target, VALID.decode())
    link.symlink_to(target)
    assert load_profile(link) == uniform_profile()
    write_atomically(link, uniform_profile(tau=0.8).to_json())
    assert link.is_symlink()
    assert load_profile(target) == uniform_profile(tau=0.8)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    write_atomically(path, VALID.decode())
    return path


def check_untouched(stored: Path) -> None:
    assert stored.read_bytes() == VALID
    assert list(stored.parent.iterdir()) == [stored]


def test_a_disk_that_fills_up_leaves_the_old_file(stored: Path) -> None:
    """The kernel itself refuses to let a file grow, as on a full disk or beyond a quota."""
    with room_for(100), pytest.raises(OSError, match="File too large"):
        write_atomically(stored, "x" * 10_000)
    check_untouched(stored)


@pytest.mark.parametrize(
    ("call", "code"),
    [("fsync", errno.EIO), ("replace", errno.ENOSPC), ("rename", errno.EROFS)],
)
def test_a_fault_at_any_step_leaves_the_old_file(
    call: str, code: int, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        write_atomically(stored, "half")
    check_untouched(stored)


def test_a_directory_that_takes_no_file_is_an_oserror(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"No such file or directory|Permission denied"):
        write_atomically("/proc/profile.json", "half")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    with pytest.raises(OSError, match="Read-only file system"):
        write_atomically(stored, "half")
    check_untouched(stored)


def test_a_clock_that_jumps_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6, 0, -100))
    monkeypatch.setattr("time.time", lambda: next(clock))
    kept: list[journal.Entry] = []
    steps = journal.Steps([], kept.append)
    steps.step("one", dict[str, int], lambda: {"value": 1})
    assert 0 <= kept[0].seconds < 1
    # Nothing that is tuned, timed or decided asks the wall clock.
    package = Path(profile_file.__file__).parents[1]
    asking = {
        path.relative_to(package).as_posix()
        for folder in ("", "kernels", "tuning")  # links in a checkout
        for path in (package / folder).rglob("*.py")
        if re.search(r"\btime\.time\(|datetime\.now\(", path.read_text(encoding="utf-8"))
    }
    # The metrics' files hold times of writing, and a profile when it was made.
    assert asking == {"observability/metrics.py", "tuning/run.py"}
    assert Profile.model_validate_json(in_field(["tuner", "created_at"], '"2106-02-07"'))
