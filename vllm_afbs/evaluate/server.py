"""A ``Predictor`` that asks a running vLLM server.

The environment variable ``VLLM_API_KEY`` holds the server's key, if it needs one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import torch
from openai import OpenAI
from openai.types import CompletionChoice

from vllm_afbs.commands.client import REQUEST_SECONDS, Counters, growth, scrape, token_id, total
from vllm_afbs.errors import InputError, one_line
from vllm_afbs.evaluate.predictor import TOP, NextToken, until_end

_PRODUCTS = "vllm_afbs_block_products_total"
_PROFILE = "vllm_afbs_profile_info"
_LEVEL = "vllm_afbs_level"
_MISREAD = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What reading an answer raises that is none of vLLM's."""


class Served:
    """A running vLLM server.

    Args:
        url: URL of the server, with or without ``/v1``.
        ends: Token ids that end an answer; they are cut off.
        profile_id: Identity of the profile that the server must run; None for a dense reference,
            which may run any.

    Attributes:
        max_model_len: Most tokens of a prompt and its answer together; None if the server does not
            say.
        level: Name of the profile's level that the server serves; None if it does not say.

    Raises:
        InputError: The server does not answer, or runs another profile.
    """

    def __init__(self, url: str, ends: set[int], profile_id: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._ends = ends
        self._client = OpenAI(
            base_url=f"{self._url}/v1",
            api_key=os.environ.get("VLLM_API_KEY", "none"),
            max_retries=0,
            timeout=REQUEST_SECONDS,
        )
        with self._one_line():
            served = self._client.models.list().data[0]
            self._model = served.id
            most = (served.model_extra or {}).get("max_model_len")
            self.max_model_len = None if most is None else int(most)
            self._before = scrape(self._url)
            runs = _served_profile(self._before)
            self.level = _served_level(self._before)
        if profile_id is not None and profile_id != runs:
            raise InputError(
                f"{self._url}: a server with profile {profile_id} expected, "
                f"got one with {runs or 'no profile'}"
            )

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """See ``Predictor``."""
        with self._one_line():
            choice = self._complete(tokens, 1, {"prompt_logprobs": 0})
            told: list[dict[str, dict[str, Any]]] = (choice.model_extra or {})["prompt_logprobs"]
            pairs = zip(told[1:], tokens[1:], strict=True)
            return -torch.tensor([float(each[str(token)]["logprob"]) for each, token in pairs])

    def next_tokens(self, prefixes: Sequence[tuple[list[int], int]]) -> list[NextToken]:
        """See ``Predictor``.

        The server may answer with the target only. The probabilities that it reports do not change
        with this: it takes them before (``--logprobs-mode raw_logprobs``, the default).
        """
        return [self._next_token(*prefix) for prefix in prefixes]

    def _next_token(self, tokens: Sequence[int], target: int) -> NextToken:
        with self._one_line():
            choice = self._complete(tokens, 1, {"logprobs": TOP, "allowed_token_ids": [target]})
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs is not None
            assert choice.logprobs.top_logprobs is not None
            found = choice.logprobs.top_logprobs[0]
            ids = {token_id(name): float(value) for name, value in found.items()}
            loss = -float(choice.logprobs.token_logprobs[0])
        top = dict(sorted(ids.items(), key=lambda each: -each[1])[:TOP])
        probabilities = torch.tensor(list(top.values())).exp().tolist()
        return NextToken(loss, dict(zip(top, probabilities, strict=True)), None)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """See ``Predictor``."""
        answers = []
        for prompt in prompts:
            with self._one_line():
                choice = self._complete(prompt, num_tokens, {"logprobs": 0})
                names = choice.logprobs.tokens if choice.logprobs is not None else None
                ids = [token_id(name) for name in names or []]
            answers.append(until_end(ids, self._ends))
        return answers

    def sparsity(self) -> float:
        """See ``Predictor``."""
        with self._one_line():
            grown = growth(self._before, scrape(self._url))
        skipped, computed = (
            total(grown, _PRODUCTS, outcome=outcome) for outcome in ("skipped", "computed")
        )
        return skipped / (skipped + computed) if skipped + computed else 0.0

    def _complete(
        self, prompt: Sequence[int], max_tokens: int, more: dict[str, Any]
    ) -> CompletionChoice:
        completion = self._client.completions.create(
            model=self._model,
            prompt=list(prompt),
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_tokens_as_token_ids": True, **more},
        )
        return completion.choices[0]

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL) as error:
            raise InputError(f"{self._url}: {one_line(error)}") from None
        except _MISREAD as error:
            raise InputError(
                f"{self._url}: a vLLM server expected, cannot read its answer: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from None


def _served_profile(counters: Counters) -> str | None:
    """Identity of the profile that a server says it runs; None if it runs without one."""
    return next((dict(labels)["profile_id"] for name, labels in counters if name == _PROFILE), None)


def _served_level(counters: Counters) -> str | None:
    """Name of the level that a server says it serves; None if it says nothing of levels."""
    served = (
        dict(labels)["level"] for (name, labels), on in counters.items() if name == _LEVEL and on
    )
    return next(served, None)
