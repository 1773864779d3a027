"""An HTTP client of a vLLM server: streamed completions, and the counters of ``/metrics``."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from openai import OpenAI
from openai.types import CompletionChoice
from prometheus_client.parser import text_string_to_metric_families

NUM_LOGPROBS = 20
REQUEST_SECONDS = 600.0

Counters = dict[tuple[str, frozenset[tuple[str, str]]], float]
"""Samples of ``/metrics`` by name and labels."""


@dataclass(frozen=True)
class Completion:
    """A greedy completion.

    Attributes:
        ttft_seconds: From sending the request to the first token.
        total_seconds: From sending the request to the stream's end.
        text: The tokens as text.
        token_ids: The tokens chosen.
        distributions: For each token, the likeliest token ids and their probabilities.
    """

    ttft_seconds: float
    total_seconds: float
    text: str
    token_ids: list[int]
    distributions: list[dict[int, float]]


def complete(url: str, model: str, prompt: Sequence[int], max_tokens: int) -> Completion:
    """Streams one greedy completion of a prompt given as token ids.

    Raises:
        openai.OpenAIError: The server refuses the request or cannot be reached.
    """
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=REQUEST_SECONDS)
    start = time.perf_counter()
    first = math.nan
    text = ""
    token_ids: list[int] = []
    distributions: list[dict[int, float]] = []
    with client.completions.create(
        model=model,
        prompt=list(prompt),
        max_tokens=max_tokens,
        temperature=0,
        logprobs=NUM_LOGPROBS,
        stream=True,
        # Two tokens may have the same text, for instance halves of one character, but not one id.
        extra_body={"return_tokens_as_token_ids": True},
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                new_ids, new_distributions = _tokens(choice)
                if new_ids and not token_ids:
                    first = time.perf_counter()
                text += choice.text
                token_ids += new_ids
                distributions += new_distributions
    return Completion(first - start, time.perf_counter() - start, text, token_ids, distributions)


def _tokens(choice: CompletionChoice) -> tuple[list[int], list[dict[int, float]]]:
    if choice.logprobs is None:
        return [], []
    distributions = [
        {token_id(name): math.exp(value) for name, value in top.items()}
        for top in choice.logprobs.top_logprobs or []
    ]
    return [token_id(name) for name in choice.logprobs.tokens or []], distributions


def token_id(name: str) -> int:
    """Reads a token as vLLM names it under ``return_tokens_as_token_ids``: ``token_id:17``."""
    return int(name.removeprefix("token_id:"))


OURS = "vllm_afbs_"


def scrape(url: str, prefix: str = OURS) -> Counters:
    """Reads a server's metrics.

    Args:
        url: URL of the server.
        prefix: Only metrics whose names begin with this are kept.

    Raises:
        httpx.HTTPError: The server cannot be reached, or ``/metrics`` answers with an error.
    """
    response = httpx.get(f"{url}/metrics", timeout=REQUEST_SECONDS)
    response.raise_for_status()
    return parse_counters(response.text, prefix)


def parse_counters(text: str, prefix: str = OURS) -> Counters:
    """Reads the Prometheus text format; keeps the samples whose names begin with ``prefix``."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(prefix)
    }


def matching(counters: Counters, name: str, **labels: str) -> list[float]:
    """Lists the values of a metric under all label sets that contain the given labels."""
    wanted = labels.items()
    return [
        value
        for (sample, have), value in counters.items()
        if sample == name and wanted <= dict(have).items()
    ]


def total(counters: Counters, name: str, **labels: str) -> float:
    """Sums a metric over all label sets that contain the given labels; 0 if there is none."""
    return sum(matching(counters, name, **labels))


def growth(before: Counters, after: Counters) -> Counters:
    """Subtracts earlier counters from later ones; a counter that is new started at zero."""
    return {key: value - before.get(key, 0.0) for key, value in after.items()}
