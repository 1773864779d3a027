"""Names out of files are text wherever they are shown, and keys are shown nowhere.

Who may change what is in ``test_routes.py``; docs/operations.md has the threat model.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.profiles import uniform_profile
from tests.test_routes import client_of, make_app
from vllm_afbs.files import write_atomically
from vllm_afbs.observability import metrics
from vllm_afbs.profile.file import load_profile
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.tuner_run import TextSource
from vllm_afbs.tuning.console import print_summary
from vllm_afbs.tuning.report import write_report

HOSTILE = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "a\nvllm_afbs_profile_loaded 99",
    'a"} 99\nvllm_afbs_enabled{x="',
    "a\\",
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</title></style><iframe src='//evil.example'>",
    "\" onmouseover='alert(1)'",
    "{{ 7 * 7 }}{% raw %}",
    "[/red][link=http://evil.example]a",
    "\x1b[31mred\x07",
    "%s%n {0}",
]
HOSTILE_NAMES = pytest.mark.parametrize("name", HOSTILE, ids=ascii)


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def named(name: str) -> Profile:
    """A profile in which every free text is this one."""
    profile = uniform_profile(model_name=name)
    run = profile.tuner.model_copy(update={"version": name, "created_at": name})
    text = TextSource(name=name, sha256="0" * 64, num_tokens=1)
    return profile.model_copy(update={"tuner": run, "calibration_texts": [text]})


class Tags(HTMLParser):
    """The elements of a page with the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, *(name for name, _ in attrs)))


def report_of(profile: Profile, directory: Path) -> list[tuple[str, ...]]:
    directory.mkdir()
    path = directory / "profile.html"
    write_report(profile, [], path)
    assert list(directory.iterdir()) == [path]
    return Tags(path.read_text(encoding="utf-8")).found


def test_a_report_shows_names_as_text(tmp_path: Path) -> None:
    hostile = named(" ".join(HOSTILE))
    assert report_of(hostile, tmp_path / "a") == report_of(named("plain"), tmp_path / "b")


@HOSTILE_NAMES
def test_a_label_holds_a_name_and_nothing_else(name: str) -> None:
    profile = named(name)
    metrics.report_profile(profile)
    registry = CollectorRegistry()
    registry.register(metrics._DirectoryCollector())
    shown = generate_latest(registry).decode()
    samples = [each for family in text_string_to_metric_families(shown) for each in family.samples]
    assert {each.name: each.value for each in samples} == {
        "vllm_afbs_profile_loaded": 1.0,
        "vllm_afbs_profile_info": 1.0,
        "vllm_afbs_layers": 0.0,  # the last of two: none without full attention
    }
    (labels,) = [each.labels for each in samples if "model" in each.labels]
    assert labels["model"] == labels["created_at"] == name
    assert labels["profile_id"] == profile.profile_id


@HOSTILE_NAMES
def test_routes_tell_a_name_as_data(name: str, tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path, named(name)))
    status, profile = client.get("/afbs/status"), client.get("/afbs/profile")
    for response in (status, profile):
        assert response.headers["content-type"] == "application/json"
    assert status.json()["model_name"] == profile.json()["profile"]["model_name"] == name
    # The page is a constant; its script puts what it asks for into text nodes.
    page = client.get("/afbs/").text
    assert page == client_of(make_app(tmp_path, named("plain"))).get("/afbs/").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)


@HOSTILE_NAMES
def test_a_name_names_no_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_atomically(path, named(name).to_json())
    loaded = load_profile(path)
    assert re.fullmatch("[0-9a-f]{12}", loaded.profile_id)
    metrics.report_profile(loaded)
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert all(
        re.fullmatch(r"profile\.json|gauge_max_afbs-\w+-\d+-[0-9a-f]{16}-\d+\.db", file)
        for file in files
    )


@HOSTILE_NAMES
def test_the_console_prints_a_name_as_text(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(named(name), tmp_path / "p.json", tmp_path / "p.html")
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "evil.example" not in name or "evil.example" in printed.out + printed.err


SECRET = "sk-very-secret-4711"


def test_a_key_is_shown_nowhere(
    tmp_path: Path, logged: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_of(make_app(tmp_path, named("plain"), [SECRET]))
    headers: list[dict[str, Any]] = [
        {},
        {"Authorization": f"Bearer {SECRET}"},
        {"Authorization": f"Bearer {SECRET}x"},
        {"Authorization": f"Basic {SECRET}"},
        {"Authorization": SECRET},
    ]
    told = [str(client.app.state), repr(vars(client.app.state))]  # type: ignore[attr-defined]
    for each in headers:
        for path in ("", "status", "layers", "profile", "enable", "disable", "nothing"):
            for call in (client.get, client.post):
                response = call(f"/afbs/{path}", headers=each)
                told += [response.text, json.dumps(dict(response.headers))]
    told += [client.get("/openapi.json").text, *logged, *capsys.readouterr()]
    told += [file.read_bytes().decode("latin-1") for file in (tmp_path / "metrics").iterdir()]
    assert len(told) > 100
    assert not [text for text in told if SECRET in text]
