"""Sends the waves of a soak to a running server and checks the server's totals after each."""

import asyncio
import time
from collections.abc import Sequence

from benchmarks.soak.checks import Expected, count_faults, expect
from benchmarks.soak.client import Answer, Client
from benchmarks.soak.plan import Request
from vllm_afbs.commands.client import Counters, growth, scrape, total
from vllm_afbs.profile.schema import Profile

NUM_CLIENTS = 5
MARKER = Request("whole", num_tokens=2, max_tokens=2, stream=False, where=0.0)
"""Sent after a wave, until the engine has finished what clients have left."""
MOST_MARKERS = 20
MARKER_SECONDS = 0.5
EMPTY = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""Metrics that must be zero when no request is running."""


def bounds(answers: Sequence[Answer], profile: Profile) -> tuple[Expected, Expected]:
    """Computes the totals of surely computed prompts, and those with possibly computed ones."""
    computed = [each.request.num_tokens for each in answers if each.fate == "computed"]
    unsure = [each.request.num_tokens for each in answers if each.fate == "unsure"]
    return expect(computed, profile), expect(computed + unsure, profile)


class Soak:
    """Sends waves and collects answers, totals and faults."""

    def __init__(self, client: Client, url: str, profile: Profile) -> None:
        """Takes the server and the profile that it serves."""
        self._client, self._url, self._profile = client, url, profile
        self.answers: list[Answer] = []
        self.faults: list[str] = []
        self.grown: Counters = {}
        self.num_exact_waves = 0

    async def run(self, waves: Sequence[Sequence[Request]], seconds: float) -> None:
        """Sends all waves at an even pace; takes at least this many seconds.

        Raises:
            httpx.HTTPError: ``/metrics`` does not answer.
        """
        first = before = await self._scrape()
        started = time.monotonic()
        for number, wave in enumerate(waves):
            await _sleep_until(started + seconds * number / len(waves))
            begin, num_faults = len(self.answers), len(self.faults)
            await self._send(wave)
            await self._settle(number)
            after = await self._scrape()
            self._check(number, self.answers[begin:], growth(before, after))
            before = after
            elapsed = f"{time.monotonic() - started:.0f} s"
            print(
                f"wave {number}: done at {elapsed}",
                *self.faults[num_faults:],
                sep="\n  ",
                flush=True,
            )
        await _sleep_until(started + seconds)
        self.grown = growth(first, await self._scrape())
        self._check_server()

    async def _send(self, wave: Sequence[Request]) -> None:
        queue = iter(wave)

        async def one_client() -> None:
            for request in queue:
                answer = await self._client.send(request)
                self.answers.append(answer)
                if answer.fault:
                    self.faults.append(f"{request}: {answer.fault}")

        await asyncio.gather(*(one_client() for _ in range(NUM_CLIENTS)))

    async def _settle(self, number: int) -> None:
        for _ in range(MOST_MARKERS):
            await self._send([MARKER])
            now = await self._scrape()
            if not any(total(now, name) for name in EMPTY):
                return
            await asyncio.sleep(MARKER_SECONDS)
        left = ", ".join(f"{name} {total(now, name):g}" for name in EMPTY)
        self.faults.append(f"wave {number}: the server still holds requests: {left}")

    def _check(self, number: int, answers: Sequence[Answer], grown: Counters) -> None:
        """Compares a wave's growth with its prompts'."""
        self.num_exact_waves += all(each.fate != "unsure" for each in answers)
        sure, possible = bounds(answers, self._profile)
        self.faults += [f"wave {number}: {each}" for each in count_faults(grown, sure, possible)]

    def _check_server(self) -> None:
        if preempted := total(self.grown, "vllm:num_preemptions_total"):
            self.faults.append(
                f"{preempted:g} requests were preempted, so the totals prove nothing"
            )
        if not total(self.grown, "vllm_afbs_block_products_total", outcome="skipped"):
            self.faults.append("no block was skipped: nothing ran sparse")

    async def _scrape(self) -> Counters:
        return await asyncio.to_thread(scrape, self._url, "vllm")


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))
