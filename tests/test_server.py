"""Real servers: metrics against a count made another way, the kill switch, concurrency."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.profiles import uniform_profile
from tests.prometheus import assert_everything_has_data, running_prometheus, tool
from vllm_afbs.commands.client import Counters, complete, growth, scrape, total
from vllm_afbs.demo.server import SERVER_ENVIRONMENT, running_server, vllm_command
from vllm_afbs.errors import InputError
from vllm_afbs.evaluate.baselines import of_profile
from vllm_afbs.evaluate.divergence import kl_divergence
from vllm_afbs.evaluate.in_process import InProcess, Runner
from vllm_afbs.evaluate.methods import Selection
from vllm_afbs.evaluate.predictor import end_tokens
from vllm_afbs.evaluate.server import Served
from vllm_afbs.files import write_atomically
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.observability.instance import DIRECTORY_VARIABLE
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import Profile

pytestmark = pytest.mark.machine

PROMPT_TOKENS, CHUNK, BLOCK = 3000, 2048, 128
SETTINGS = {"per_head_metrics": True, "sample_rate": 1.0}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Where it listens.
        model_dir: Checkpoint of the model.
        profile: What it serves.
    """

    url: str
    model_dir: Path
    profile: Profile


def of_first_layers(model: Path, num_layers: int, directory: Path) -> Path:
    """A checkpoint of a model's first layers."""
    first = AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=num_layers)
    first.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


# Every layer's work is the same, and all thirty of them take minutes on a small machine.
def eager_layers(smollm2: Path, directory: Path) -> list[str]:
    return [str(of_first_layers(smollm2, 8, directory / "model")), "--enforce-eager"]


def compiled_layers_and_two_api_servers(smollm2: Path, directory: Path) -> list[str]:
    return [str(of_first_layers(smollm2, 2, directory / "model")), "--api-server-count", "2"]


@pytest.fixture(
    scope="module",
    params=[eager_layers, compiled_layers_and_two_api_servers],
    ids=lambda param: param.__name__,
)
def server(
    request: pytest.FixtureRequest, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    model, *options = request.param(smollm2_dir, directory)
    profile = uniform_profile(ModelFingerprint.from_config(AutoConfig.from_pretrained(model)))
    path = directory / "profile.json"
    write_atomically(path, profile.to_json())
    command = [
        *vllm_command(), "serve", model,
        "--attention-backend", "afbs",
        "--dtype", "float32",
        "--max-model-len", "8192",
        "--served-model-name", "model",
        "--max-num-batched-tokens", str(CHUNK),
        "--additional-config", json.dumps({"afbs": SETTINGS}),
        *options,
    ]  # fmt: skip
    environment = {
        **os.environ,
        **SERVER_ENVIRONMENT,
        "VLLM_AFBS_PROFILE": str(path),
        "VLLM_PLUGINS": "afbs",
        # Its own: what imports vLLM in this process names one that all of its children would share.
        DIRECTORY_VARIABLE: str(directory / "metrics"),
    }
    with running_server(command, environment, directory / "server.log") as url:
        yield Server(url, Path(model), profile)


ON_EAGER_LAYERS = pytest.mark.parametrize(
    "server", [eager_layers], ids=["eager_layers"], indirect=True
)


def test_metrics_agree_with_a_count_made_another_way(server: Server) -> None:
    url, profile = server.url, server.profile
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
        assert total(grown, by_head, layer="1", head=str(head)) == 2 * blocks_per_head
    tokens = "vllm_afbs_prefill_tokens_total"
    assert total(grown, tokens) == PROMPT_TOKENS * profile.model.num_layers
    num_sparse = total(grown, f"{seconds}_count", path="sparse")
    assert total(grown, tokens, path="sparse") > 0
    num_samples = total(grown, "vllm_afbs_sampled_error_count")
    assert num_samples == num_sparse
    assert 0 < total(grown, "vllm_afbs_sampled_error_sum") < num_samples
    estimate = total(grown, "vllm_afbs_dense_estimate_seconds_total")
    assert estimate > total(grown, f"{seconds}_sum", path="sparse") / 2


def test_the_kill_switch_reaches_the_workers(server: Server) -> None:
    url, profile = server.url, server.profile
    num_layers, name = profile.model.num_layers, "vllm_afbs_prefill_tokens_total"

    def grown_by_a_prompt(first: int) -> Counters:
        before = scrape(url)
        complete(url, "model", [first + i % 900 for i in range(1200)], 1)
        return growth(before, scrape(url))

    off = httpx.post(f"{url}/afbs/disable", timeout=30).json()
    assert off["enabled"] is False
    assert off["num_acknowledged"] == off["num_workers"] == 1
    assert scrape(url)["vllm_afbs_enabled", frozenset()] == 0
    grown = grown_by_a_prompt(2000)
    assert total(grown, name, path="dense") == 1200 * num_layers
    assert total(grown, name, path="sparse") == 0
    assert total(grown, "vllm_afbs_dense_fallbacks_total", reason="disabled") == num_layers
    assert total(grown, "vllm_afbs_block_products_total") == 0
    assert httpx.get(f"{url}/afbs/status").json()["fallbacks"]["disabled"] >= num_layers

    assert httpx.post(f"{url}/afbs/enable", timeout=30).json()["pending"] is None
    assert scrape(url)["vllm_afbs_enabled", frozenset()] == 1
    assert total(grown_by_a_prompt(4000), name, path="sparse") > 0
    layers = httpx.get(f"{url}/afbs/layers").json()
    assert len(layers) == num_layers
    assert all(head["live"]["computed"] > 0 for layer in layers for head in layer["heads"])
    served = httpx.get(f"{url}/afbs/profile").json()
    assert Profile.model_validate(served["profile"]) == profile


@ON_EAGER_LAYERS
def test_an_evaluation_through_the_server_finds_what_one_in_process_does(
    server: Server,
) -> None:
    """Sparse prefill, its losses and the next token, against the emulation of both."""
    url, profile = server.url, server.profile
    model = open_model(str(server.model_dir))
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
    one, other = (each.next_tokens([(tokens[5:], 11)])[0] for each in (served, here))
    # Of a token at e^-10: there the few blocks that rounding carries over tau show.
    assert one.loss == pytest.approx(other.loss, abs=0.1)
    assert kl_divergence(other.top, one.top) < 1e-3
    assert served.generate([tokens[9:]], 4) == here.generate([tokens[9:]], 4)
    with pytest.raises(InputError, match=r"a server with profile 000 expected, got one with"):
        Served(url, set(), "000")


def test_concurrent_requests_and_an_abort(server: Server) -> None:
    url = server.url

    def abort() -> None:
        """Leaves a slow server in the middle of the prefill, and a fast one in the answer."""
        body = {
            "model": "model", "prompt": [9] * 4000, "max_tokens": 4000, "ignore_eos": True,
            "stream": True,
        }  # fmt: skip
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=1.0) as response,
        ):
            assert response.is_success
            next(response.iter_raw())

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


@ON_EAGER_LAYERS
def test_prometheus_has_an_answer_for_every_panel_and_rule(server: Server, tmp_path: Path) -> None:
    tool("prometheus")
    url = server.url
    with running_prometheus(url, tmp_path) as prometheus:
        prometheus.wait_for_scrapes(1)
        for first_token in (3000, 4000):  # nothing of it is in the prefix cache
            complete(url, "model", [first_token + i % 900 for i in range(1500)], 4)
            # One that may have begun before the answer, one with it, and one for rules of rules.
            prometheus.wait_for_scrapes(3)
        assert_everything_has_data(prometheus)
