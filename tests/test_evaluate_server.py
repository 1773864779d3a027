"""Evaluating through a server: a fake one that refuses prompts which are too long, as vLLM does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.profiles import uniform_profile
from tests.profiles import of_levels
from tests.test_evaluate import BLOCK, arguments
from vllm_afbs.evaluate.__main__ import main
from vllm_afbs.files import write_atomically
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.profile.schema import Profile

REACH = 256


class FakeServer(ThreadingHTTPServer):
    """Answers as vLLM does, with made-up probabilities.

    Attributes:
        max_model_len: Most tokens of a prompt and its answer.
        profile_id: Of the profile that it claims to run.
        level: Of the profile, which it claims to serve; None to say nothing of levels.
        prompts: Lengths of the prompts with their answers, in order.
        broken: Answers sent instead of the right ones, by path.
    """

    def __init__(self, profile_id: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.max_model_len: Any = REACH
        self.profile_id = profile_id
        self.level: str | None = None
        self.prompts: list[int] = []
        self.broken: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def models(self) -> dict[str, Any]:
        card = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm"}
        return {"object": "list", "data": [card | {"max_model_len": self.max_model_len}]}

    def completion(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt, count = asked["prompt"], asked["max_tokens"]
        self.prompts.append(len(prompt) + count)
        if len(prompt) + count > self.max_model_len:
            message = f"maximum context length is {self.max_model_len} tokens"
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        (token,) = asked.get("allowed_token_ids", [5])
        name = f"token_id:{token}"
        choice: dict[str, Any] = {
            "index": 0, "text": "x" * count, "finish_reason": "length",
            "logprobs": {
                "tokens": [name] * count, "token_logprobs": [-1.0] * count,
                "top_logprobs": [{name: -1.0}] * count, "text_offset": [0] * count,
            },
        }  # fmt: skip
        if "prompt_logprobs" in asked:
            told = [{str(each): {"logprob": -0.5 - each / 999}} for each in prompt[1:]]
            choice["prompt_logprobs"] = [None, *told]
        return 200, {
            "id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice],
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/metrics":
            labels = f'profile_id="{self.server.profile_id}"'
            metrics = f"vllm_afbs_profile_info{{{labels}}} 1\n"
            if self.server.level is not None:
                on = {"slow": 0.0, "fast": 0.0, self.server.level: 1.0}
                metrics += "".join(
                    f'vllm_afbs_level{{level="{name}"}} {value}\n' for name, value in on.items()
                )
            self._send(200, metrics)
        else:
            self._send(200, json.dumps(self.server.models()))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = self.server.completion(asked)
        self._send(status, json.dumps(answer))

    def _send(self, status: int, body: str) -> None:
        content = self.server.broken.get(self.path, body).encode()
        self.send_response(status)
        kind = "text/plain" if self.path == "/metrics" else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def profile(tiny_model: Path) -> Profile:
    shape = open_model(str(tiny_model)).fingerprint
    blocks = {"block_q": BLOCK, "block_k": BLOCK}
    by_name = {
        name: uniform_profile(shape, tau, sparsity, [128, REACH], **blocks)
        for name, tau, sparsity in (("slow", 0.9, 0.2), ("fast", 0.6, 0.5))
    }
    return of_levels(by_name, "fast")


@pytest.fixture
def server(profile: Profile) -> Iterator[FakeServer]:
    fake = FakeServer(profile.profile_id)
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


class Evaluation:
    """The command line, with this server for the sparse answers and the dense ones."""

    def __init__(self, server: FakeServer, model: Path, profile: Profile, folder: Path) -> None:
        file = folder / "profile.json"
        write_atomically(file, profile.to_json())
        self.output = folder / "quality.json"
        urls = ["--server", server.url, "--dense-server", server.url]
        self._given = [*arguments(model, file, self.output), *urls]

    def run(self, *more: str) -> int:
        return main([*self._given, *more])


@pytest.fixture
def evaluation(
    server: FakeServer, tiny_model: Path, profile: Profile, tmp_path: Path
) -> Evaluation:
    return Evaluation(server, tiny_model, profile, tmp_path)


def test_the_default_length_fits_the_server_with_what_is_generated(
    server: FakeServer, evaluation: Evaluation
) -> None:
    assert evaluation.run() == 0
    assert json.loads(evaluation.output.read_text())["length"] == REACH - 1
    assert max(server.prompts) == REACH
    server.prompts.clear()
    assert evaluation.run("--tests", "prefixes", "agreement") == 0
    assert json.loads(evaluation.output.read_text())["length"] == REACH
    assert max(server.prompts) == REACH


@pytest.mark.parametrize(
    ("serves", "asked", "evaluated"),
    [(None, [], "fast"), ("slow", [], "slow"), ("slow", ["--level", "slow"], "slow")],
)
def test_the_level_is_the_one_that_the_server_serves(
    serves: str | None,
    asked: list[str],
    evaluated: str,
    server: FakeServer,
    evaluation: Evaluation,
) -> None:
    server.level = serves
    assert evaluation.run("--tests", "prefixes", *asked) == 0
    assert json.loads(evaluation.output.read_text())["level"] == evaluated


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("fast", "--level: slow expected, which http"),
        ("none", "--level: one of slow, fast expected, got 'none'"),
    ],
)
def test_another_level_than_the_servers_is_refused(
    asked: str,
    complaint: str,
    server: FakeServer,
    evaluation: Evaluation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.level = "slow"
    assert evaluation.run("--level", asked) == 2
    assert complaint in capsys.readouterr().err
    assert not server.prompts


def test_a_larger_server_takes_what_the_profile_makes_sparse(
    server: FakeServer, evaluation: Evaluation
) -> None:
    server.max_model_len = 4096
    assert evaluation.run() == 0
    assert json.loads(evaluation.output.read_text())["length"] == REACH


@pytest.mark.parametrize(
    ("most", "given", "complaint"),
    [
        (
            REACH,
            ["--length", "256"],
            "--length: 128 to 255 expected (--dense-server: max_model_len",
        ),
        (200, ["--length", "200"], "--length: 128 to 199 expected (--dense-server: max_model_len"),
        (100, [], "--dense-server: max_model_len 100 of that server: at least 129 expected"),
        ("many", [], "a vLLM server expected, cannot read its answer: ValueError"),
    ],
)
def test_a_length_that_a_server_does_not_take_is_refused_before_anything_runs(
    most: Any,
    given: list[str],
    complaint: str,
    server: FakeServer,
    evaluation: Evaluation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.max_model_len = most
    assert evaluation.run(*given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert server.prompts == []
    assert not evaluation.output.exists()


ODD_CHOICES: list[Any] = [
    {},
    {"index": 0, "text": "x", "finish_reason": "length", "logprobs": None},
    {
        "index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": [None],
        "logprobs": {"tokens": ["x"], "token_logprobs": [None], "top_logprobs": [{"x": -1}]},
    },
]  # fmt: skip
BROKEN = [
    *((path, body) for path in ("/v1/models", "/v1/completions") for body in (
        "<html>not vLLM</html>", "{}", "[]", "null", '{"data": []}', '{"choices": []}', '{"data": ',
    )),
    *(("/v1/completions", json.dumps({"choices": [choice]})) for choice in ODD_CHOICES),
    ("/metrics", "vllm_afbs_profile_info{ 1\n"),
    ("/metrics", "vllm_afbs_profile_info 1\n"),
    ("/metrics", "<html>"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), BROKEN)
@pytest.mark.parametrize("test", ["perplexity", "prefixes"])
def test_what_is_no_answer_of_vllm_is_one_line(
    path: str,
    body: str,
    test: str,
    server: FakeServer,
    evaluation: Evaluation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.broken[path] = body
    assert evaluation.run("--tests", test) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert server.url in lines[0]
