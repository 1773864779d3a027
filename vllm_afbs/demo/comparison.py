"""Sends one prompt to several servers in turn and compares their answers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from vllm_afbs.commands import client
from vllm_afbs.commands.client import Completion, Counters, matching
from vllm_afbs.demo.assets import MAX_MODEL_LEN
from vllm_afbs.demo.server import SERVER_ENVIRONMENT, running_server, vllm_command
from vllm_afbs.evaluate import divergence
from vllm_afbs.serving.settings import PROFILE_VARIABLE

SERVED_NAME = "demo"


@dataclass(frozen=True)
class Arm:
    """One way to serve the model.

    Attributes:
        name: Name in the report and in the log's file name.
        backend: Value of ``--attention-backend``.
        plugins: Whether vLLM may load plugins; without them, it is stock vLLM in every part.
        profile: The profile to serve.
    """

    name: str
    backend: str
    plugins: bool
    profile: Path | None

    def environment(self) -> dict[str, str]:
        """Environment of the server: this process's, with the settings of the arm."""
        environment = os.environ | SERVER_ENVIRONMENT
        for name in (PROFILE_VARIABLE, "VLLM_PLUGINS"):
            environment.pop(name, None)
        if not self.plugins:
            environment["VLLM_PLUGINS"] = ""
        if self.profile is not None:
            environment[PROFILE_VARIABLE] = str(self.profile)
        return environment

    def command(self, model_dir: Path) -> list[str]:
        """The server's command line, without host and port."""
        return [
            *vllm_command(),
            "serve",
            str(model_dir),
            *("--served-model-name", SERVED_NAME),
            *("--attention-backend", self.backend),
            *("--dtype", "float32"),
            *("--max-model-len", str(MAX_MODEL_LEN)),
        ]


def arms(profile: Path) -> list[Arm]:
    """Makes the demo's arms: stock vLLM, our backend without a profile, our backend with it."""
    return [
        Arm("stock", "CPU_ATTN", plugins=False, profile=None),
        Arm("dense", "afbs", plugins=True, profile=None),
        Arm("sparse", "afbs", plugins=True, profile=profile),
    ]


@dataclass(frozen=True)
class Outcome:
    """An arm's completion, and how much the server's counters grew meanwhile."""

    arm: Arm
    completion: Completion
    counters: Counters

    def total(self, name: str, **labels: str) -> float | None:
        """Sums a metric over all label sets with the given labels; None if there is none."""
        values = matching(self.counters, name, **labels)
        return sum(values) if values else None

    @property
    def attention_seconds(self) -> float | None:
        """Seconds of prefill attention over all layers, with selection; None from stock vLLM."""
        return self.total("vllm_afbs_prefill_attention_seconds_sum")

    @property
    def selector_seconds(self) -> float | None:
        """Seconds of selection over all layers; None from stock vLLM."""
        return self.total("vllm_afbs_selector_seconds_sum")

    @property
    def sparsity_by_layer(self) -> dict[int, float]:
        """Share of the block products skipped, by layer; layers that counted none are left out."""
        layers = {
            int(layer)
            for (name, labels), value in self.counters.items()
            if name == "vllm_afbs_block_products_total"
            and value
            and (layer := dict(labels)["layer"])
        }
        return {layer: self._sparsity(layer=str(layer)) for layer in sorted(layers)}

    @property
    def sparsity(self) -> float | None:
        """Share of all counted block products that were skipped; None if none were counted."""
        return self._sparsity() if self.sparsity_by_layer else None

    def _sparsity(self, **labels: str) -> float:
        name = "vllm_afbs_block_products_total"
        skipped = self.total(name, outcome="skipped", **labels) or 0.0
        computed = self.total(name, outcome="computed", **labels) or 0.0
        return skipped / (skipped + computed)

    @property
    def fallbacks(self) -> dict[str, float]:
        """Prefills that layers left to vLLM's dense backend, by reason."""
        return {
            dict(labels)["reason"]: value
            for (name, labels), value in self.counters.items()
            if name == "vllm_afbs_dense_fallbacks_total" and value
        }


@dataclass(frozen=True)
class Shift:
    """How far an answer moved from the stock server's.

    The divergences are lower bounds, as ``divergence.coarsen`` explains. The means are taken over
    the ``agreed_tokens`` and the token after them: only as long as the chosen tokens agree do both
    servers predict from the same text.

    Attributes:
        kl_first: KL(stock || this) of the first token, in nats.
        tv_first: Total variation of the first token.
        same_top_1: Whether both chose the same first token.
        kl_mean: Mean KL, in nats.
        tv_mean: Mean total variation.
        agreed_tokens: Number of tokens that the greedy continuations have in common from the start.
    """

    kl_first: float
    tv_first: float
    same_top_1: bool
    kl_mean: float
    tv_mean: float
    agreed_tokens: int


def shift(stock: Completion, other: Completion) -> Shift:
    """Compares two completions of one prompt."""
    agreed = divergence.agreement_length(stock.token_ids, other.token_ids)
    pairs = list(zip(stock.distributions, other.distributions, strict=False))[: agreed + 1]
    kl = [divergence.kl_divergence(p, q) for p, q in pairs]
    tv = [divergence.total_variation(p, q) for p, q in pairs]
    return Shift(kl[0], tv[0], agreed > 0, fmean(kl), fmean(tv), agreed)


def measure(
    arm: Arm,
    model_dir: Path,
    prompt: Sequence[int],
    warm_up: Sequence[int],
    max_tokens: int,
    log_file: Path,
) -> Outcome:
    """Starts an arm's server, warms it up and sends it the prompt.

    Args:
        arm: How to serve.
        model_dir: The Hugging Face checkpoint.
        prompt: Token ids of the prompt.
        warm_up: Token ids of another prompt. It must not begin like ``prompt``, whose prefill would
            then be shortened by the prefix cache.
        max_tokens: Length of the answer.
        log_file: Where the server's log goes.

    Raises:
        ServerError: The server did not start.
        openai.OpenAIError: A request failed.
        httpx.HTTPError: The server's ``/metrics`` cannot be read.
    """
    command = arm.command(model_dir)
    with running_server(command, arm.environment(), log_file) as url:
        client.complete(url, SERVED_NAME, warm_up, max_tokens=2)
        before = client.scrape(url)
        completion = client.complete(url, SERVED_NAME, prompt, max_tokens)
        return Outcome(arm, completion, client.growth(before, client.scrape(url)))
