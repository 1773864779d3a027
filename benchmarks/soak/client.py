"""Sends one request of a soak, reads the answer or hangs up, and checks the answer."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import httpx

from benchmarks.soak.plan import Request
from vllm_afbs.demo.comparison import SERVED_NAME

Fate = Literal["computed", "unsure", "refused"]
"""What became of a prompt; it is unsure if the client hung up before the first token."""

LEAST_PATIENCE_SECONDS = 0.02
PATIENCE_SECONDS = 0.5
TOKENS_PER_SECOND = 500
"""Rough speed of prefills: clients hang up within the time that a prompt may take."""

_VALID: dict[str, Any] = {"model": SERVED_NAME, "prompt": [1, 2, 3], "max_tokens": 1}
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Malformed:
    """A body that is not a valid request, and the status that must answer it."""

    name: str
    content: bytes
    status: int = HTTPStatus.BAD_REQUEST


def _changed(name: str, status: int = HTTPStatus.BAD_REQUEST, **fields: Any) -> Malformed:
    return Malformed(name, json.dumps(_VALID | fields).encode(), status)


MALFORMED = (
    Malformed("nothing", b""),
    Malformed("half a body", json.dumps(_VALID).encode()[:20]),
    Malformed("no UTF-8", b'{"prompt": "\xff\xfe"}'),
    Malformed("a list", b"[1, 2, 3]"),
    Malformed("no prompt", json.dumps({"model": SERVED_NAME}).encode()),
    _changed("an empty prompt", prompt=[]),
    _changed("an object as prompt", prompt={"text": "hello"}),
    _changed("a token beyond the vocabulary", prompt=[10**6]),
    _changed("a negative length", max_tokens=-1),
    _changed("an answer beyond the model's length", max_tokens=10**6),
    _changed("a word as temperature", temperature="warm"),
    _changed("an unknown model", model="nobody", status=HTTPStatus.NOT_FOUND),
)


@dataclass(frozen=True)
class Answer:
    """The outcome of a request.

    Attributes:
        request: The request.
        fate: Whether its prompt was computed.
        first_token_seconds: From sending to the first token of a stream.
        fault: What was wrong with the answer, in a line; None if nothing.
    """

    request: Request
    fate: Fate
    first_token_seconds: float | None = None
    fault: str | None = None


class Client:
    """Sends a plan's requests to a server."""

    def __init__(self, url: str, tokens: Sequence[int], timeout_seconds: float) -> None:
        """Takes the text, as token ids, that prompts are cut out of.

        The text must be at least as long as the longest prompt that the model accepts.
        """
        self._tokens = tokens
        self._http = httpx.AsyncClient(
            base_url=url, timeout=timeout_seconds, limits=httpx.Limits(max_connections=None)
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def send(self, request: Request) -> Answer:
        """Sends a request and reads as much of the answer as its kind says."""
        try:
            if request.kind == "malformed":
                return await self._send_malformed(request)
            if request.kind == "too_long":
                response = await self._http.post("/v1/completions", json=self._body(request))
                fault = _status_fault(response.status_code, HTTPStatus.BAD_REQUEST)
                return Answer(request, "refused", fault=fault)
            if request.kind == "leave_waiting":
                return await self._leave_waiting(request)
            return await self._read(request)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            return Answer(request, "unsure", fault=f"{type(error).__name__}: {error}")

    async def _send_malformed(self, request: Request) -> Answer:
        body = MALFORMED[int(request.where * len(MALFORMED))]
        response = await self._http.post("/v1/completions", content=body.content, headers=_JSON)
        fault = _status_fault(response.status_code, body.status)
        return Answer(request, "refused", fault=fault and f"{body.name}: {fault}")

    async def _leave_waiting(self, request: Request) -> Answer:
        most = PATIENCE_SECONDS + request.num_tokens / TOKENS_PER_SECOND
        try:
            async with asyncio.timeout(LEAST_PATIENCE_SECONDS + request.where * most):
                return await self._read(request)
        except TimeoutError:
            return Answer(request, "unsure")

    async def _read(self, request: Request) -> Answer:
        if request.stream:
            return await self._read_stream(request)
        response = await self._http.post("/v1/completions", json=self._body(request))
        fault = _status_fault(response.status_code, HTTPStatus.OK)
        return Answer(request, "computed", fault=fault or _usage_fault(response.json(), request))

    async def _read_stream(self, request: Request) -> Answer:
        started = time.perf_counter()
        first_token_seconds: float | None = None
        last: dict[str, Any] = {}
        async with self._http.stream("POST", "/v1/completions", json=self._body(request)) as reply:
            if fault := _status_fault(reply.status_code, HTTPStatus.OK):
                return Answer(request, "computed", fault=fault)
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                last = json.loads(line.removeprefix("data: "))
                if last.get("choices") and first_token_seconds is None:
                    first_token_seconds = time.perf_counter() - started
                    if request.kind != "whole":
                        return Answer(request, "computed", first_token_seconds)
        return Answer(request, "computed", first_token_seconds, _usage_fault(last, request))

    def _body(self, request: Request) -> dict[str, Any]:
        start = int(request.where * max(len(self._tokens) - request.num_tokens, 1))
        prompt = self._tokens[start : start + request.num_tokens]
        if request.kind == "too_long":  # the text may be shorter than the prompt
            prompt = [self._tokens[start]] * request.num_tokens
        body = {
            "model": SERVED_NAME,
            "prompt": prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": request.stream,
        }
        return body | ({"stream_options": {"include_usage": True}} if request.stream else {})


def _status_fault(status: int, expected: int) -> str | None:
    return None if status == expected else f"status {expected} expected, got {status}"


def _usage_fault(answer: dict[str, Any], request: Request) -> str | None:
    usage = answer.get("usage") or {}
    got = usage.get("prompt_tokens"), usage.get("completion_tokens")
    expected = request.num_tokens, request.max_tokens
    return None if got == expected else f"tokens in and out {expected} expected, got {got}"
