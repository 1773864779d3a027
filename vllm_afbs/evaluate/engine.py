"""A ``Predictor`` that has vLLM run the model, dense or with a profile, as a server would."""

from collections.abc import Sequence

import torch

from vllm_afbs.engine.client import VllmEngine
from vllm_afbs.evaluate.predictor import TOP, NextToken, until_end
from vllm_afbs.profile.schema import Profile


class InEngine:
    """A model in vLLM's process; several predictors may share it.

    Args:
        engine: The engine. The model is loaded when the first question is asked.
        profile: The profile; None runs the model dense.
        ends: Token ids that end an answer; they are cut off.
    """

    def __init__(self, engine: VllmEngine, profile: Profile | None, ends: set[int]) -> None:
        self._engine = engine
        self._profile = profile
        self._ends = ends

    def losses(self, tokens: Sequence[int]) -> torch.Tensor:
        """See ``Predictor``."""
        return self._serving().score(tokens, range(len(tokens) - 1))[0]

    def next_tokens(self, prefixes: Sequence[tuple[list[int], int]]) -> list[NextToken]:
        """See ``Predictor``."""
        if not prefixes:
            return []
        prompts, targets = zip(*prefixes, strict=True)
        found = []
        for each in self._serving().next_tokens(prompts, targets, TOP):
            tokens, values = zip(*each["top"], strict=True)
            probabilities = torch.tensor(values).exp().tolist()
            top = dict(zip(tokens, probabilities, strict=True))
            found.append(NextToken(float(each["loss"]), top, None))
        return found

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """See ``Predictor``."""
        if not prompts:
            return []
        answers = self._serving().generate(prompts, num_tokens)
        return [until_end(answer, self._ends) for answer in answers]

    def sparsity(self) -> float:
        """See ``Predictor``."""
        if self._profile is None:
            return 0.0
        # Only steps that a profile is served in count block products.
        found = self._engine.products()
        total = found["skipped"] + found["computed"]
        return found["skipped"] / total if total else 0.0

    def _serving(self) -> VllmEngine:
        self._engine.loaded()
        self._engine.serve(self._profile)
        return self._engine
