"""The routes under ``/afbs``: who may do what, what they tell, and the page in a real browser."""

import asyncio
import re
import shutil
import subprocess
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from tests.profiles import uniform_profile
from tests.switch_workers import workers
from vllm_afbs.demo.server import HOST, free_port
from vllm_afbs.files import write_atomically
from vllm_afbs.observability import fallbacks, kill_switch, metrics, routes, server_file
from vllm_afbs.observability.routes import RoutesPlugin
from vllm_afbs.profile.adapters import AdapterLevel, AdapterProfile
from vllm_afbs.profile.schema import LayerProfile, Profile
from vllm_afbs.serving import configuration

CHROMIUM = shutil.which("chromium")
LOCAL, REMOTE = "127.0.0.1", "192.0.2.7"
ADAPTER = AdapterProfile(
    name="<i>one</i>", sha256="a" * 64, levels=[AdapterLevel(kl=0.01, holds=True)]
)


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def make_app(
    tmp_path: Path,
    profile: Profile | None = None,
    api_key: list[str] | None = None,
    num_workers: int = 0,
    weights: str = "unknown",
    **settings: Any,
) -> FastAPI:
    """A server's app as vLLM would set it up."""
    if profile is not None:
        path = tmp_path / "profile.json"
        write_atomically(path, profile.to_json())
        settings |= {"profile": str(path), "profile_id": profile.profile_id}
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="AFBS"), backend_per_kind={}),
        additional_config={"afbs": settings},
        observability_config=SimpleNamespace(),
        lora_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(
            world_size=num_workers,
            data_parallel_size=1,
            data_parallel_external_lb=False,
            data_parallel_hybrid_lb=False,
        ),
    )
    configuration.hand_over(config, weights=weights)
    kill_switch.begin()
    app, plugin = FastAPI(), RoutesPlugin()
    plugin.attach_router(app)
    engine = SimpleNamespace(vllm_config=config)
    asyncio.run(plugin.init_state(engine, app.state, Namespace(api_key=api_key)))
    return app


def client_of(app: Any, peer: str = LOCAL, host: str = "localhost:8000") -> TestClient:
    return TestClient(app, base_url=f"http://{host}", client=(peer, 4711))


KEYS = ["first-key", "second-key"]
KEYLESS = [
    (LOCAL, {}, 200),
    ("127.8.9.1", {}, 200),
    ("::1", {}, 200),
    ("::ffff:127.0.0.1", {}, 200),
    (REMOTE, {}, 403),
    ("::ffff:192.0.2.7", {}, 403),
    ("10.0.0.1", {}, 403),
    ("not an address", {}, 403),
    (REMOTE, {"X-Forwarded-For": LOCAL}, 403),
    (REMOTE, {"Authorization": "Bearer first-key"}, 403),
    # What came through a proxy came from somewhere else.
    (LOCAL, {"X-Forwarded-For": REMOTE}, 403),
    (LOCAL, {"X-Forwarded-For": LOCAL}, 403),
    (LOCAL, {"Forwarded": "for=127.0.0.1"}, 403),
    (LOCAL, {"X-Real-IP": LOCAL}, 403),
    # A page from elsewhere in a browser on this machine.
    (LOCAL, {"Origin": "http://evil.example"}, 403),
    (LOCAL, {"Origin": "null"}, 403),
    (LOCAL, {"Origin": "http://localhost:8000"}, 200),
    (LOCAL, {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, 403),
    (LOCAL, {"Host": "evil.example:8000"}, 403),
    (LOCAL, {"Host": "127.0.0.1:8000"}, 200),
    (LOCAL, {"Host": "[::1]:8000"}, 200),
]
KEYED = [
    (REMOTE, {"Authorization": "Bearer first-key"}, 200),
    (REMOTE, {"Authorization": "bearer second-key"}, 200),
    (REMOTE, {}, 401),
    (LOCAL, {}, 401),
    (LOCAL, {"Authorization": "Bearer first-ke"}, 401),
    (LOCAL, {"Authorization": "Bearer first-key "}, 200),  # HTTP strips what surrounds a value
    (LOCAL, {"Authorization": "Bearer wrong"}, 401),
    (LOCAL, {"Authorization": "Bearer "}, 401),
    (LOCAL, {"Authorization": "Basic first-key"}, 401),
    (LOCAL, {"Authorization": "first-key"}, 401),
]
TABLE = [(None, *row) for row in KEYLESS] + [(KEYS, *row) for row in KEYED]


@pytest.mark.parametrize(("keys", "peer", "headers", "expected"), TABLE, ids=str)
def test_only_who_may_moves_the_switch(
    keys: list[str] | None, peer: str, headers: dict[str, str], expected: int, tmp_path: Path
) -> None:
    client = client_of(make_app(tmp_path, api_key=keys), peer)
    response = client.post("/afbs/disable", headers=headers)
    assert response.status_code == expected
    assert kill_switch.read_state().enabled == (expected != 200)
    kill_switch.set_enabled(False)
    assert client.post("/afbs/enable", headers=headers).status_code == expected
    assert kill_switch.read_state().enabled == (expected == 200)
    if expected != 200:
        assert isinstance(response.json()["detail"], str)
    # Reading is open, as /metrics is.
    assert client.get("/afbs/status", headers=headers).status_code == 200


def test_a_key_of_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "third-key")
    client = client_of(make_app(tmp_path))
    assert client.post("/afbs/disable").status_code == 401
    headers = {"Authorization": "Bearer third-key"}
    assert client.post("/afbs/disable", headers=headers).status_code == 200


def test_an_address_that_uvicorn_took_from_a_header_proves_nothing(tmp_path: Path) -> None:
    app = ProxyHeadersMiddleware(make_app(tmp_path), trusted_hosts="*")  # type: ignore[arg-type]
    headers = {"X-Forwarded-For": LOCAL}
    assert client_of(app, REMOTE).post("/afbs/disable", headers=headers).status_code == 403


def test_the_switch_answers_with_its_state(tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path))
    off = client.post("/afbs/disable").json()
    assert off["enabled"] is False
    assert off["disabled_since"].endswith("Z")
    assert client.get("/afbs/status").json()["disabled_since"] == off["disabled_since"]
    assert client.post("/afbs/enable").json() == {
        "enabled": True,
        "disabled_since": None,
        "num_workers": 0,
        "num_acknowledged": 0,
        "pending": None,
    }
    assert client.get("/afbs/disable").status_code == 405


def test_the_switch_answers_when_all_workers_have_acknowledged(tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path, num_workers=2))
    with workers(2) as started:
        for route, enabled in (("disable", False), ("enable", True)):
            answer = client.post(f"/afbs/{route}").json()
            assert answer["enabled"] is enabled
            assert answer["num_acknowledged"] == answer["num_workers"] == 2
            assert answer["pending"] is None
            assert [worker.is_enabled() for worker in started] == [enabled, enabled]


def test_what_has_not_acknowledged_in_time_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "ANSWER_SECONDS", 2.0)
    client = client_of(make_app(tmp_path, num_workers=3))  # one of them is on another machine
    with workers(2):
        off = client.post("/afbs/disable").json()
        assert off["enabled"] is False
        assert (off["num_workers"], off["num_acknowledged"]) == (3, 2)
        assert off["pending"].startswith("1 of 3 workers have not acknowledged and may still run")
        assert client.get("/afbs/status").json()["pending"] == off["pending"]


def test_a_switch_that_cannot_be_written_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(make_app(tmp_path))

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system", "FILE")

    monkeypatch.setattr(server_file, "write_atomically", refuse)
    response = client.post("/afbs/disable")
    assert response.status_code == 500
    assert "The switch is unchanged" in response.json()["detail"]
    assert kill_switch.read_state().enabled


@pytest.mark.parametrize("weights", ["same", "other", "unknown"])
def test_the_status_tells_whose_weights_are_served(weights: str, tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path, uniform_profile(), weights=weights))
    assert client.get("/afbs/status").json()["weights"] == weights


@pytest.mark.parametrize(("setting", "lists"), [("validated", True), ("base", False)])
def test_the_status_tells_which_adapters_may_run_sparse(
    setting: str, lists: bool, tmp_path: Path
) -> None:
    client = client_of(make_app(tmp_path, uniform_profile(adapters=[ADAPTER]), lora=setting))
    expected = [ADAPTER.model_dump()] if lists else []
    assert client.get("/afbs/status").json()["adapters"] == expected


def count_something() -> None:
    metrics.count_products(1, [1, 2, 3, 4], 10, range(4))
    metrics.count_tokens("sparse", 300)
    metrics.count_tokens("dense", 100)
    fallbacks.count({"short_context": 3})
    metrics.PREFILL_ATTENTION_SECONDS.observe(2.0, "sparse")
    metrics.DENSE_ESTIMATE_SECONDS.inc(5.0)
    metrics.SAMPLED_ERROR.observe(0.02, "1")
    metrics.SAMPLED_ERROR.observe(0.04, "1")


def test_routes_tell_what_workers_counted(tmp_path: Path) -> None:
    profile = uniform_profile(sparsity=0.4)
    client = client_of(make_app(tmp_path, profile, per_head_metrics=True), REMOTE)
    before = client.get("/afbs/status").json()
    assert before["live"] == {"computed": 0, "skipped": 0, "sparsity": None}
    assert before["sampled_error"] is None

    count_something()
    status = client.get("/afbs/status").json()
    assert status["backend"] is status["enabled"] is True
    assert status["profile_id"] == profile.profile_id
    assert status["live"] == {"computed": 20, "skipped": 60, "sparsity": 0.75}
    assert (status["sparse_tokens"], status["dense_tokens"]) == (300, 100)
    assert status["saved_seconds"] == pytest.approx(3.0)
    assert status["samples"] == 2
    assert status["sampled_error"] == pytest.approx(0.03)
    assert status["fallbacks"] == {"short_context": 3}

    layers = client.get("/afbs/layers").json()
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert layers[0]["live"]["sparsity"] is None
    assert layers[1]["live"]["sparsity"] == 0.75
    assert layers[1]["calibrated_sparsity"] == pytest.approx(0.4)
    assert layers[1]["sampled_error"] == pytest.approx(0.03)
    heads = layers[1]["heads"]
    assert [head["live"]["computed"] for head in heads] == [2, 4, 6, 8]
    assert [head["live"]["sparsity"] for head in heads] == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert {head["tau"] for head in heads} == {0.9}

    served = client.get("/afbs/profile").json()
    assert served["profile_id"] == profile.profile_id
    assert Profile.model_validate(served["profile"]) == profile


def test_layers_without_full_attention_are_counted_and_not_shown(tmp_path: Path) -> None:
    profile = uniform_profile()
    no_heads = LayerProfile(levels=[])
    hybrid = profile.model_copy(update={"layers": [no_heads, profile.layers[1]]})
    client = client_of(make_app(tmp_path, hybrid))
    status = client.get("/afbs/status").json()
    assert (status["full_layers"], status["other_layers"]) == (1, 1)
    assert [layer["layer"] for layer in client.get("/afbs/layers").json()] == [1]


def test_the_profile_is_not_hashed_anew_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = uniform_profile()
    expected = profile.profile_id
    client = client_of(make_app(tmp_path, profile))
    monkeypatch.setattr(Profile, "to_json", lambda _: pytest.fail("written out for a look"))
    for route in ("status", "profile"):
        assert client.get(f"/afbs/{route}").json()["profile_id"] == expected


def test_without_a_profile_there_is_none_to_show(tmp_path: Path) -> None:
    client = client_of(make_app(tmp_path))
    assert client.get("/afbs/profile").status_code == 404
    assert client.get("/afbs/layers").status_code == 404
    assert client.get("/afbs/status").json()["profile_id"] is None


def test_heads_are_not_told_unless_they_are_counted(tmp_path: Path) -> None:
    layers = client_of(make_app(tmp_path, uniform_profile())).get("/afbs/layers").json()
    assert {head["live"] for layer in layers for head in layer["heads"]} == {None}


def test_routes_are_documented(tmp_path: Path) -> None:
    paths = client_of(make_app(tmp_path)).get("/openapi.json").json()["paths"]
    assert set(paths) == {
        f"/afbs/{name}"
        for name in ("", "profile", "status", "layers", "disable", "enable", "level")
    }
    for name in ("disable", "enable", "level"):
        operation = paths[f"/afbs/{name}"]["post"]
        assert {"200", "401", "403"} <= set(operation["responses"])
        assert operation["security"]
    for methods in paths.values():
        for operation in methods.values():
            assert operation["description"]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    response = client_of(make_app(tmp_path), REMOTE).get("/afbs")
    assert response.url.path == "/afbs/"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.findall(r'(?:src|href)="(?!data:)', response.text)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
@pytest.mark.parametrize("per_head", [True, False], ids=["by-head", "by-layer"])
def test_a_browser_draws_the_heat_map_without_an_error(per_head: bool, tmp_path: Path) -> None:
    profile = uniform_profile(model_name="<b>model</b>", adapters=[ADAPTER])
    settings = {"per_head_metrics": per_head, "lora": "validated"}
    app = make_app(tmp_path, profile, num_workers=1, weights="other", **settings)
    count_something()
    kill_switch.set_enabled(False)
    with serving(app) as url:
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr",
                "--virtual-time-budget=8000", "--dump-dom", f"{url}/afbs/",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert ">disabled, pending</span>" in done.stdout
    assert "1 of 1 workers have not acknowledged" in done.stdout
    assert "not those that the profile was tuned on" in done.stdout
    assert "&lt;b&gt;model&lt;/b&gt;" in done.stdout
    assert "&lt;i&gt;one&lt;/i&gt;: sparse at all levels" in done.stdout
    assert "75.0 %" in done.stdout
    cells = re.findall(r'<td title="([^"]*)"(?: style="[^"]*background: ([^;"]*))?', done.stdout)
    if per_head:
        assert len(cells) == 2 * 4
        assert cells[4][0].startswith("layer 1, head 0: sparsity 0.900, calibrated 0.500, tau")
        drawn = [bool(colour) for _, colour in cells]
        assert drawn == [False] * 4 + [True] * 4
        assert len({colour for _, colour in cells[4:]}) == 4
    else:
        assert [title.split(":")[0] for title, _ in cells] == ["layer 0", "layer 1"]
        assert "sampled error 0.0300" in cells[1][0]
        assert [bool(colour) for _, colour in cells] == [False, True]
