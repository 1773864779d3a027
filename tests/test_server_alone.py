"""The wheel without extras, beside vLLM and nothing else: it serves, and says what commands need.

The environment holds links to the distributions that vLLM requires, directly or not, and to no
others. pip then installs the wheel into it with its dependencies, from no index, so that all of
them have to be there. Installing vLLM once more would take 3 GB, for the same modules.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.distributions import build, clean_environment, copy_sources, link, required_by, run
from tests.profiles import uniform_profile
from tests.test_server import of_first_layers
from vllm_afbs.commands.client import complete, growth, scrape, total
from vllm_afbs.demo.server import SERVER_ENVIRONMENT, running_server
from vllm_afbs.files import write_atomically
from vllm_afbs.observability.instance import DIRECTORY_VARIABLE
from vllm_afbs.profile.fingerprint import ModelFingerprint

PROMPT_TOKENS = 3000


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


@pytest.mark.machine
def test_a_server_serves_with_nothing_but_vllm(
    python: Path, smollm2_dir: Path, tmp_path: Path
) -> None:
    model = of_first_layers(smollm2_dir, 2, tmp_path / "model")
    profile = uniform_profile(ModelFingerprint.from_config(AutoConfig.from_pretrained(model)))
    write_atomically(tmp_path / "profile.json", profile.to_json())
    command = [
        str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--attention-backend", "afbs",
        "--dtype", "float32",
        "--max-model-len", "8192",
        "--served-model-name", "model",
        "--enforce-eager",
    ]  # fmt: skip
    environment = {
        **clean_environment(),
        **SERVER_ENVIRONMENT,
        "VLLM_AFBS_PROFILE": str(tmp_path / "profile.json"),
        "VLLM_PLUGINS": "afbs",
        DIRECTORY_VARIABLE: str(tmp_path / "metrics"),
    }
    with running_server(command, environment, tmp_path / "server.log") as url:
        before = scrape(url)
        answer = complete(url, "model", [7 + i % 1000 for i in range(PROMPT_TOKENS)], 2)
        grown = growth(before, scrape(url))
    assert len(answer.token_ids) == 2
    num_tokens = PROMPT_TOKENS * profile.model.num_layers
    assert total(grown, "vllm_afbs_prefill_tokens_total") == num_tokens
    assert total(grown, "vllm_afbs_prefill_tokens_total", path="sparse") > 0
    assert total(grown, "vllm_afbs_block_products_total", outcome="skipped") > 0
