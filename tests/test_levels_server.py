"""A real server whose level is turned while it serves."""

import json
import os
from collections.abc import Iterator

import httpx
import pytest

from tests.hybrids import LENGTH
from tests.models import save_small_model
from tests.profiles import of_levels
from tests.test_levels import of_layers
from vllm_afbs.commands.client import complete, growth, scrape, total
from vllm_afbs.demo.server import SERVER_ENVIRONMENT, running_server, vllm_command
from vllm_afbs.files import write_atomically
from vllm_afbs.observability.instance import DIRECTORY_VARIABLE

pytestmark = [pytest.mark.machine, pytest.mark.slow]

SPARSE_LAYERS = {"exact": (), "middle": (0,), "fast": (1,)}
PROFILE = of_levels(
    {"exact": of_layers(1.0, 1.0), "middle": of_layers(0.3, 1.0), "fast": of_layers(1.0, 0.3)},
    default="exact",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    model = save_small_model(directory / "model", max_position_embeddings=2 * LENGTH)
    path = directory / "profile.json"
    write_atomically(path, PROFILE.to_json())
    command = [
        *vllm_command(), "serve", str(model),
        "--attention-backend", "afbs",
        "--dtype", "float32",
        "--served-model-name", "model",
        "--max-num-batched-tokens", "2048",
        "--enforce-eager",
        "--additional-config", json.dumps({"afbs": {"level": "middle"}}),
    ]  # fmt: skip
    environment = {
        **os.environ,
        **SERVER_ENVIRONMENT,
        "VLLM_AFBS_PROFILE": str(path),
        "VLLM_PLUGINS": "afbs",
        DIRECTORY_VARIABLE: str(directory / "metrics"),
    }
    with running_server(command, environment, directory / "server.log") as url:
        yield url


def sparse_layers(url: str, first: int) -> tuple[int, ...]:
    """The layers that skipped something of a prompt."""
    before = scrape(url)
    complete(url, "model", [3 + (first + 7 * row * row) % 250 for row in range(LENGTH)], 1)
    grown = growth(before, scrape(url))
    name = "vllm_afbs_block_products_total"
    assert total(grown, name) > 0
    skipped = {layer: total(grown, name, layer=str(layer), outcome="skipped") for layer in (0, 1)}
    return tuple(layer for layer, count in skipped.items() if count > 0)


def test_the_route_turns_the_level_of_the_worker(url: str) -> None:
    levels = list(SPARSE_LAYERS)
    assert sparse_layers(url, 1) == SPARSE_LAYERS["middle"]
    for number, level in enumerate(["fast", "exact", "middle", "fast"], start=2):
        answer = httpx.post(f"{url}/afbs/level", json={"level": level}, timeout=30).json()
        assert (answer["level"], answer["start_level"]) == (level, "middle")
        assert answer["num_acknowledged"] == answer["num_workers"] == 1
        assert answer["pending"] is None
        shown = scrape(url)
        for each in levels:
            assert shown["vllm_afbs_level", frozenset({("level", each)})] == (each == level)
        assert sparse_layers(url, number) == SPARSE_LAYERS[level]
        layers = httpx.get(f"{url}/afbs/layers").json()
        assert tuple(each["layer"] for each in layers if each["sparse"]) == SPARSE_LAYERS[level]
    refused = httpx.post(f"{url}/afbs/level", json={"level": "slow"}, timeout=30)
    assert refused.status_code == 400
    assert "one of exact, middle, fast expected" in refused.json()["error"]["message"]
    # The kill switch wins, and the level is where it was afterwards.
    assert httpx.post(f"{url}/afbs/disable", timeout=30).json()["pending"] is None
    assert httpx.get(f"{url}/afbs/status").json()["level"]["level"] == "fast"
    before = scrape(url)
    complete(url, "model", [9] * LENGTH, 1)
    assert total(growth(before, scrape(url)), "vllm_afbs_prefill_tokens_total", path="sparse") == 0
    assert httpx.post(f"{url}/afbs/enable", timeout=30).json()["pending"] is None
    assert sparse_layers(url, 9) == SPARSE_LAYERS["fast"]
