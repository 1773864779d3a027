"""The wheel without extras, beside vLLM and nothing else: what it serves, checks and asks for.

The environment holds links to the distributions that vLLM requires, directly or not, and to no
others. pip then installs the wheel into it with its dependencies, from no index, so that all of
them have to be there. Installing vLLM once more would take 3 GB, for the same modules.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import AutoConfig

from tests.distributions import build, clean_environment, copy_sources, link, required_by, run
from tests.profiles import of_levels, uniform_profile
from tests.test_server import of_first_layers
from vllm_afbs.commands.client import complete, growth, scrape, total
from vllm_afbs.demo.server import SERVER_ENVIRONMENT, running_server
from vllm_afbs.files import write_atomically
from vllm_afbs.observability.instance import DIRECTORY_VARIABLE
from vllm_afbs.profile.fingerprint import ModelFingerprint

PROMPT_TOKENS, NUM_LAYERS = 1500, 2
SPARSE_LAYERS: dict[str, tuple[int, ...]] = {"exact": (), "middle": (0,), "fast": (1,)}
"""By level."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's Python."""
    root = tmp_path_factory.mktemp("alone")
    wheel = build("wheel", copy_sources(tmp_path_factory.mktemp("source")), root)
    run(sys.executable, "-m", "venv", "--without-pip", root / "venv", cwd=root)
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    distributions = required_by("vllm")
    assert not {"ax-platform", "plotly", "vllm-afbs"} & distributions.keys()
    link(distributions.values(), packages)
    python = root / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-index", wheel, cwd=root)
    return python


def test_the_environment_is_the_wheels(python: Path, tmp_path: Path) -> None:
    code = "import importlib.util as i, vllm_afbs; print(vllm_afbs.__file__); "
    code += "print([n for n in ('ax', 'benchmarks', 'plotly', 'tests') if i.find_spec(n)])"
    file, found = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parents[1])
    assert found == "[]"


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [
        ("tune", ["--model", "m", "--output", "profile.json"], "tune"),
        ("evaluate", ["--model", "m", "--profile", "p", "--output", "q.json"], "evaluate"),
        ("demo", ["--output-dir", "results"], "demo"),
        ("demo.assets", [], "demo"),
    ],
)
def test_a_command_without_its_extra_says_what_to_install(
    module: str, options: list[str], extra: str, python: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [python, "-m", f"vllm_afbs.{module}", *options],
        cwd=tmp_path,
        env=clean_environment() | {"VLLM_AFBS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "ax, plotly" in line
    assert line.endswith(f"not installed: pip install 'vllm-afbs[{extra}]'")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Server:
    """A running server of three levels, which begins with ``middle``.

    Attributes:
        url: Where it listens.
        arguments: Of ``vllm serve`` and of the check.
        environment: The server's, and the check's.
        log: What it logged until it answered.
    """

    url: str
    arguments: list[str]
    environment: dict[str, str]
    log: str


def save_profile(model: Path, path: Path) -> None:
    """A profile in which each layer is sparse at one level, and dense at the others."""
    fingerprint = ModelFingerprint.from_config(AutoConfig.from_pretrained(model))
    sparse, dense = (uniform_profile(fingerprint, tau=tau) for tau in (0.3, 1.0))
    levels = {}
    for level, chosen in SPARSE_LAYERS.items():
        layers = [(sparse if i in chosen else dense).layers[i] for i in range(NUM_LAYERS)]
        levels[level] = dense.model_copy(update={"layers": layers})
    write_atomically(path, of_levels(levels, default="exact").to_json())


@pytest.fixture(scope="module")
def server(
    python: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    model = of_first_layers(smollm2_dir, NUM_LAYERS, directory / "model")
    save_profile(model, directory / "profile.json")
    arguments = [
        "--attention-backend", "afbs",
        "--dtype", "float32",
        "--max-model-len", "8192",
        "--enforce-eager",
        "--additional-config", json.dumps({"afbs": {"level": "middle"}}),
    ]  # fmt: skip
    environment = {
        **clean_environment(),
        **SERVER_ENVIRONMENT,
        "VLLM_AFBS_PROFILE": str(directory / "profile.json"),
        "VLLM_PLUGINS": "afbs",
        DIRECTORY_VARIABLE: str(directory / "metrics"),
    }
    environment.pop("VLLM_LOGGING_LEVEL", None)
    command = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model), *arguments]
    command += ["--served-model-name", "model"]
    log_file = directory / "server.log"
    with running_server(command, environment, log_file) as url:
        log = log_file.read_text(encoding="utf-8")
        yield Server(url, ["--model", str(model), *arguments], environment, log)


@pytest.mark.machine
def test_a_server_serves_with_nothing_but_vllm(server: Server) -> None:
    before = scrape(server.url)
    answer = complete(server.url, "model", [7 + i % 1000 for i in range(PROMPT_TOKENS)], 2)
    grown = growth(before, scrape(server.url))
    assert len(answer.token_ids) == 2
    tokens = "vllm_afbs_prefill_tokens_total"
    assert total(grown, tokens) == PROMPT_TOKENS * NUM_LAYERS
    assert total(grown, tokens, path="sparse") == PROMPT_TOKENS * len(SPARSE_LAYERS["middle"])
    assert total(grown, "vllm_afbs_block_products_total", outcome="skipped") > 0


@pytest.mark.machine
def test_a_server_says_once_what_the_check_says(
    server: Server, python: Path, tmp_path: Path
) -> None:
    """Real weights, a real engine, and its real metadata builders."""
    command = [str(python), "-m", "vllm_afbs.check", *server.arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=server.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = done.stdout.splitlines()[-1].removeprefix("on: ")
    layers, dense = "1 of 2 layers sparse", "1 dense: profile_dense"
    assert answer == f"{layers} at level middle from 1,024 to 8,192 tokens; {dense}"
    assert server.log.count(f"{answer}.") == 1
    assert server.log.count("layers sparse") == 1


def sparse_layers(url: str, first: int) -> tuple[int, ...]:
    """The layers that skipped something of a prompt."""
    before = scrape(url)
    complete(url, "model", [3 + (first + 7 * row * row) % 250 for row in range(PROMPT_TOKENS)], 1)
    grown = growth(before, scrape(url))
    name = "vllm_afbs_block_products_total"
    assert total(grown, name) > 0
    skipped = {layer: total(grown, name, layer=str(layer), outcome="skipped") for layer in (0, 1)}
    return tuple(layer for layer, count in skipped.items() if count > 0)


@pytest.mark.machine
def test_the_route_turns_the_level_of_the_worker(server: Server) -> None:
    url, levels = server.url, list(SPARSE_LAYERS)
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
    complete(url, "model", [9] * PROMPT_TOKENS, 1)
    assert total(growth(before, scrape(url)), "vllm_afbs_prefill_tokens_total", path="sparse") == 0
    assert httpx.post(f"{url}/afbs/enable", timeout=30).json()["pending"] is None
    assert sparse_layers(url, 9) == SPARSE_LAYERS["fast"]
