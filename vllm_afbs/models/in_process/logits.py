"""A model's logits over a long text, of which only some rows are ever held."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

_ROWS = 1024


def logits_in_parts(model: Any, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Logits of all positions but the last, ``[_ROWS, vocabulary]`` at a time.

    All of a long text's together are tens of gigabytes. The body runs once. How rows become logits
    is the model's own matter (some scale them), so the whole model runs on each part of them with a
    body that has the part ready.

    Args:
        model: A causal language model of transformers.
        ids: Token ids, ``[1, length]``.
    """
    body = model.base_model
    output = body(input_ids=ids, use_cache=False)
    run = body.forward
    try:
        for part in output.last_hidden_state[:, :-1].split(_ROWS, dim=1):
            body.forward = lambda *_, part=part, **__: replace(output, last_hidden_state=part)
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
            yield logits
    finally:
        body.forward = run


def token_losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of every token after the first, in nats, ``[length - 1]``, fp32."""
    targets = ids[0, 1:].split(_ROWS)
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
            for logits, target in zip(logits_in_parts(model, ids), targets, strict=True)
        ]
    ).cpu()
