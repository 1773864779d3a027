"""The level through the routes: who may turn it, what they tell, and the page's buttons."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.profiles import of_levels, uniform_profile
from tests.switch_workers import workers
from tests.test_routes import (
    CHROMIUM,
    KEYS,
    LOCAL,
    REMOTE,
    TABLE,
    _directory,
    client_of,
    make_app,
    serving,
)
from vllm_afbs.observability import routes, server_file
from vllm_afbs.observability.served_level import Levels
from vllm_afbs.profile.schema import LengthEstimate, Profile
from vllm_afbs.profile.tuner_run import WholeModel

__all__ = ["_directory"]  # a fixture for all tests here

LEVELS = Levels(("exact", "fast"), start="exact")
WHOLE = WholeModel(sparsity=0.625, kl=0.0123, perplexity=9.5, dense_perplexity=9.25)


def of_two_levels() -> Profile:
    """Tau and sparsity differ, and one of the levels is measured."""
    by_name = {"exact": uniform_profile(), "fast": uniform_profile(tau=0.5, sparsity=0.8)}
    profile = of_levels(by_name, default="exact")
    estimates = [
        LengthEstimate(length=1024, sparsity=0.25),
        LengthEstimate(length=8192, sparsity=0.8, attention_time_ratio=0.375),
    ]
    fast = profile.levels[1].model_copy(update={"whole_model": WHOLE, "by_length": estimates})
    return profile.model_copy(update={"levels": [profile.levels[0], fast]})


@pytest.mark.parametrize(("keys", "peer", "headers", "expected"), TABLE, ids=str)
def test_only_who_may_turns_the_level(
    keys: list[str] | None, peer: str, headers: dict[str, str], expected: int, tmp_path: Path
) -> None:
    client = client_of(make_app(tmp_path, of_two_levels(), api_key=keys), peer)
    # A wrong name is not told from a right one before it is known who asks.
    wrong = client.post("/afbs/level", headers=headers, json={"level": "none"})
    assert wrong.status_code == (400 if expected == 200 else expected)
    response = client.post("/afbs/level", headers=headers, json={"level": "fast"})
    assert response.status_code == expected
    assert LEVELS.read() == ("fast" if expected == 200 else "exact")
    assert client.get("/afbs/status", headers=headers).status_code == 200


def test_the_route_answers_when_all_workers_serve_the_level(tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path, of_two_levels(), num_workers=2))
    with workers(2, LEVELS) as started:
        for index, level in ((1, "fast"), (0, "exact")):
            answer = client.post("/afbs/level", json={"level": level}).json()
            assert answer == {
                "level": level,
                "start_level": "exact",
                "num_workers": 2,
                "num_acknowledged": 2,
                "pending": None,
            }
            assert [worker.level() for worker in started] == [index, index]
            status = client.get("/afbs/status").json()
            assert status["level"] == answer
    # The switch stayed where it was.
    assert status["enabled"] is True


def test_what_has_not_acknowledged_in_time_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "ANSWER_SECONDS", 2.0)
    client = client_of(make_app(tmp_path, of_two_levels(), num_workers=3))
    with workers(2, LEVELS):
        answer = client.post("/afbs/level", json={"level": "fast"}).json()
        assert (answer["num_workers"], answer["num_acknowledged"]) == (3, 2)
        assert answer["pending"].startswith(
            "1 of 3 workers have not acknowledged and may still serve another level: "
        )


@pytest.mark.parametrize("name", ["slow", "", "Fast", "fast\n", "x" * 10_000])
def test_an_unknown_level_is_refused_with_those_there_are(name: str, tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path, of_two_levels()))
    response = client.post("/afbs/level", json={"level": name})
    assert response.status_code == 400
    detail = response.json()["detail"]
    assert detail.startswith("level: one of exact, fast expected, got ")
    assert detail.isprintable()
    assert len(detail) < 200
    assert LEVELS.read() == "exact"


@pytest.mark.parametrize("body", [{}, {"level": 1}, {"level": None}, "fast", None])
def test_a_body_of_another_form_is_refused(body: object, tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path, of_two_levels()))
    assert client.post("/afbs/level", json=body).status_code == 422
    assert LEVELS.read() == "exact"


def test_a_level_that_cannot_be_written_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(make_app(tmp_path, of_two_levels()))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system", "FILE")

    monkeypatch.setattr(server_file, "write_atomically", refuse)
    response = client.post("/afbs/level", json={"level": "fast"})
    assert response.status_code == 500
    assert "The level is unchanged" in response.json()["detail"]


def test_without_a_profile_there_is_no_level(tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path))
    assert client.post("/afbs/level", json={"level": "fast"}).status_code == 404
    status = client.get("/afbs/status").json()
    assert (status["level"], status["levels"]) == (None, [])


def test_routes_tell_what_the_served_level_was_tuned_to(tmp_path: Path) -> None:
    profile = of_two_levels()
    client = client_of(make_app(tmp_path, profile, level="fast"))
    status = client.get("/afbs/status").json()
    assert (status["level"]["level"], status["level"]["start_level"]) == ("fast", "fast")
    assert status["levels"] == [level.model_dump() for level in profile.levels]
    for level, tau, sparsity in (("fast", 0.5, 0.8), ("exact", 0.9, 0.5)):
        client.post("/afbs/level", json={"level": level})
        for layer in client.get("/afbs/layers").json():
            assert layer["calibrated_sparsity"] == pytest.approx(sparsity)
            assert {head["tau"] for head in layer["heads"]} == {tau}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize(
    ("keys", "typed", "served"),
    [(None, [], "fast"), (KEYS, ["wrong", "second-key"], "fast"), (KEYS, [None], "exact")],
    ids=["local", "with a key", "without a key"],
)
def test_a_buttons_click_serves_its_level(
    keys: list[str] | None,
    typed: list[str | None],
    served: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = (
        f"const typed = {json.dumps(typed)}; window.prompt = () => typed.shift();"
        "setTimeout(() => document.querySelector('#levels button').click(), 2000);"
    )
    page = routes._PAGE.replace("</body>", f"<script>{script}</script></body>")
    monkeypatch.setattr(routes, "_PAGE", page)
    monkeypatch.setattr(routes, "ANSWER_SECONDS", 0.1)
    with serving(make_app(tmp_path, of_two_levels(), api_key=keys, num_workers=1)) as url:
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=9000",
                "--dump-dom", f"{url}/afbs/",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    assert LEVELS.read() == served
    rows = re.findall(r"<tr class=\"(served)?\">(.*?)</tr>", done.stdout)
    cells = [re.findall(r"<td>(.*?)</td>", row) for _, row in rows]
    assert [bool(mark) for mark, _ in rows] == [served == "exact", served == "fast"]
    unknown = "0.50, time unknown"
    assert cells[0][:-1] == ["exact", "not measured", "", "", "", unknown]
    assert cells[1][:-1] == [
        "fast", "0.0123", "9.500 (9.250)", "0.625", "0.25, time unknown",
        "0.80, 38 % of the time",
    ]  # fmt: skip
    assert [row[-1] == "served" for row in cells] == [served == "exact", served == "fast"]
    assert ("API key expected" in done.stdout) == (served == "exact")
    assert "may still serve another level" in done.stdout


def test_reading_is_open_and_posting_is_not_from_elsewhere(tmp_path: Path) -> None:
    app = make_app(tmp_path, of_two_levels())
    assert client_of(app, REMOTE).get("/afbs/status").json()["level"]["level"] == "exact"
    assert client_of(app, REMOTE).post("/afbs/level", json={"level": "fast"}).status_code == 403
    assert client_of(app, LOCAL).post("/afbs/level", json={"level": "fast"}).status_code == 200
