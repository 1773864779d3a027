"""Real servers: metrics against a count made another way, the kill switch, concurrency, refusal."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoConfig

from tests.profiles import uniform_profile
from tests.prometheus import assert_everything_has_data, running_prometheus, tool
from vllm_afbs.demo.client import Counters, complete, growth, scrape
from vllm_afbs.demo.divergence import kl_divergence
from vllm_afbs.demo.server import HOST, SERVER_ENVIRONMENT, free_port, running_server, vllm_command
from vllm_afbs.evaluate.baselines import of_profile
from vllm_afbs.evaluate.in_process import InProcess, Runner
from vllm_afbs.evaluate.methods import Selection
from vllm_afbs.evaluate.predictor import end_tokens
from vllm_afbs.evaluate.server import Served
from vllm_afbs.metrics import DIRECTORY_VARIABLE
from vllm_afbs.profile import ModelFingerprint, Profile
from vllm_afbs.profile_file import write_atomically
from vllm_afbs.tuning.model import InputError, open_model

pytestmark = pytest.mark.machine

PROMPT_TOKENS, CHUNK, BLOCK = 3000, 2048, 128
ENVIRONMENT = os.environ | SERVER_ENVIRONMENT
SETTINGS = {"per_head_metrics": True, "sample_rate": 1.0}


@pytest.fixture(scope="module")
def profile(smollm2_dir: Path) -> Profile:
    return uniform_profile(ModelFingerprint.from_config(AutoConfig.from_pretrained(smollm2_dir)))


def serve(model: Path, *options: str) -> list[str]:
    command = [*vllm_command(), "serve", str(model), "--attention-backend", "afbs"]
    command += ["--dtype", "float32", "--max-model-len", "8192"]
    return [*command, "--served-model-name", "model", *options]


@pytest.fixture(scope="module", params=[1, 2], ids=["one-api-server", "two-api-servers"])
def url(
    request: pytest.FixtureRequest,
    smollm2_dir: Path,
    profile: Profile,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    # One of the two compiles, which takes minutes on a small machine; the other need not.
    eager = ["--enforce-eager"] if request.param > 1 else []
    path = directory / "profile.json"
    write_atomically(path, profile.to_json())
    command = serve(
        smollm2_dir,
        "--max-num-batched-tokens", str(CHUNK),
        "--api-server-count", str(request.param),
        "--additional-config", json.dumps({"afbs": SETTINGS}),
        *eager,
    )  # fmt: skip
    environment = {
        **ENVIRONMENT,
        "VLLM_AFBS_PROFILE": str(path),
        "VLLM_PLUGINS": "afbs",
        # Its own: what imports vLLM in this process names one that all of its children would share.
        DIRECTORY_VARIABLE: str(directory / "metrics"),
    }
    with running_server(command, environment, directory / "server.log") as server_url:
        yield server_url


def total(counters: Counters, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(
        value for (sample, have), value in counters.items() if sample == name and wanted <= have
    )


def test_metrics_agree_with_a_count_made_another_way(url: str, profile: Profile) -> None:
    before = scrape(url)
    assert before["vllm_afbs_profile_loaded", frozenset()] == 1
    complete(url, "model", [7 + i % 1000 for i in range(PROMPT_TOKENS)], 2)
    grown = growth(before, scrape(url))

    num_q_blocks = -(-PROMPT_TOKENS // BLOCK)
    blocks_per_head = sum(1 for i in range(num_q_blocks) for j in range(num_q_blocks) if j <= i)
    name = "vllm_afbs_block_products_total"
    for layer in range(profile.model.num_layers):
        done = total(grown, name, layer=str(layer))
        assert done == 2 * profile.model.num_heads * blocks_per_head
    assert total(grown, name, outcome="skipped") > 0

    num_chunks = -(-PROMPT_TOKENS // CHUNK)
    seconds = "vllm_afbs_prefill_attention_seconds"
    dense = total(grown, f"{seconds}_count", path="dense")
    assert total(grown, f"{seconds}_count") == num_chunks * profile.model.num_layers
    assert total(grown, "vllm_afbs_dense_fallbacks_total", reason="dense_is_faster") == dense
    assert total(grown, "vllm_afbs_selector_seconds_sum") < total(grown, f"{seconds}_sum")

    by_head = "vllm_afbs_head_block_products_total"
    for outcome in ("computed", "skipped"):
        assert total(grown, by_head, outcome=outcome) == total(grown, name, outcome=outcome)
    for head in range(profile.model.num_heads):
        assert total(grown, by_head, layer="3", head=str(head)) == 2 * blocks_per_head
    tokens = "vllm_afbs_prefill_tokens_total"
    assert total(grown, tokens) == PROMPT_TOKENS * profile.model.num_layers
    num_sparse = total(grown, f"{seconds}_count", path="sparse")
    assert total(grown, tokens, path="sparse") > 0
    num_samples = total(grown, "vllm_afbs_sampled_error_count")
    assert num_samples == num_sparse
    assert 0 < total(grown, "vllm_afbs_sampled_error_sum") < num_samples
    estimate = total(grown, "vllm_afbs_dense_estimate_seconds_total")
    assert estimate > total(grown, f"{seconds}_sum", path="sparse") / 2


def test_the_kill_switch_reaches_the_workers(url: str, profile: Profile) -> None:
    num_layers, name = profile.model.num_layers, "vllm_afbs_prefill_tokens_total"

    def grown_by_a_prompt(first: int) -> Counters:
        before = scrape(url)
        complete(url, "model", [first + i % 900 for i in range(1200)], 1)
        return growth(before, scrape(url))

    assert httpx.post(f"{url}/afbs/disable").json()["enabled"] is False
    assert scrape(url)["vllm_afbs_enabled", frozenset()] == 0
    grown = grown_by_a_prompt(2000)
    assert total(grown, name, path="dense") == 1200 * num_layers
    assert total(grown, name, path="sparse") == 0
    assert total(grown, "vllm_afbs_dense_fallbacks_total", reason="disabled") == num_layers
    assert total(grown, "vllm_afbs_block_products_total") == 0
    assert httpx.get(f"{url}/afbs/status").json()["fallbacks"]["disabled"] >= num_layers

    assert httpx.post(f"{url}/afbs/enable").json()["enabled"] is True
    assert scrape(url)["vllm_afbs_enabled", frozenset()] == 1
    assert total(grown_by_a_prompt(4000), name, path="sparse") > 0
    layers = httpx.get(f"{url}/afbs/layers").json()
    assert len(layers) == num_layers
    assert all(head["live"]["computed"] > 0 for layer in layers for head in layer["heads"])
    served = httpx.get(f"{url}/afbs/profile").json()
    assert Profile.model_validate(served["profile"]) == profile


@pytest.mark.parametrize("url", [1], indirect=True, ids=["one-api-server"])
def test_an_evaluation_through_the_server_finds_what_one_in_process_does(
    url: str, profile: Profile, smollm2_dir: Path
) -> None:
    """Sparse prefill, its losses and the next token, against the emulation of both."""
    model = open_model(str(smollm2_dir))
    served = Served(url, end_tokens(model), profile.profile_id)
    tokens = [7 + i * i % 1000 for i in range(1400)]
    runner = Runner(model)
    dense, here = (
        InProcess(runner, each) for each in (None, Selection(of_profile("", profile), 0.0))
    )
    losses = served.losses(tokens)
    expected = here.losses(tokens)
    assert float((losses - expected).abs().mean()) < 0.01
    assert float((losses - dense.losses(tokens)).abs().mean()) > 0.05
    assert served.sparsity() == pytest.approx(here.sparsity(), abs=0.005)
    # Prompts that begin otherwise, or the server would read most of them from its cache.
    one, other = (each.next_token(tokens[5:], 11) for each in (served, here))
    # Of a token at e^-10: there the few blocks that rounding carries over tau show.
    assert one.loss == pytest.approx(other.loss, abs=0.1)
    assert kl_divergence(other.top, one.top) < 1e-3
    assert served.generate([tokens[9:]], 4) == here.generate([tokens[9:]], 4)
    with pytest.raises(InputError, match=r"a server of profile 000 expected, it serves"):
        Served(url, set(), "000")


def test_concurrent_requests_and_an_abort(url: str) -> None:
    def abort() -> None:
        body = {"model": "model", "prompt": [9] * 4000, "max_tokens": 500, "stream": True}
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=1.0) as response,
        ):
            list(response.iter_raw())

    lengths = (1500, 2500, 30, 1100)
    with ThreadPoolExecutor() as pool:
        aborted = pool.submit(abort)
        answers = [
            pool.submit(complete, url, "model", [11 + i % (500 + n) for i in range(n)], 4)
            for n in lengths
        ]
        aborted.result()
        for answer in answers:
            assert len(answer.result().token_ids) in range(1, 5)
    assert httpx.get(f"{url}/health").is_success


@pytest.mark.parametrize("url", [1], ids=["one-api-server"], indirect=True)
def test_prometheus_has_an_answer_for_every_panel_and_rule(url: str, tmp_path: Path) -> None:
    tool("prometheus")
    with running_prometheus(url, tmp_path) as prometheus:
        for first_token in (3000, 4000):  # nothing of it is in the prefix cache
            complete(url, "model", [first_token + i % 900 for i in range(1500)], 4)
        assert_everything_has_data(prometheus)


def _corrupt(text: str) -> str:
    return text[: len(text) // 2]


def _other_model(text: str) -> str:
    return text.replace('"head_dim": 64', '"head_dim": 96')


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [(_corrupt, "not valid JSON"), (_other_model, "model.head_dim is 96 in the profile and 64")],
)
def test_a_bad_profile_stops_the_server_with_one_line(
    spoil: Callable[[str], str],
    complaint: str,
    smollm2_dir: Path,
    profile: Profile,
    tmp_path: Path,
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(spoil(profile.to_json()))
    command = serve(smollm2_dir, "--host", HOST, "--port", str(free_port()))
    done: Any = subprocess.run(
        command,
        env={**ENVIRONMENT, "VLLM_AFBS_PROFILE": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"vllm-afbs: {path}: ")
    assert complaint in last_line
    assert "Traceback" not in done.stderr
