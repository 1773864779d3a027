"""Layers that a search can be compared with an exhaustive grid on."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_afbs.captures import Capture, LayerTensors
from vllm_afbs.tuning.windows import by_text, held_out


def clustered(length: int, seed: int) -> LayerTensors:
    """Runs of tokens about one topic: queries find the blocks of their topic."""
    generator = torch.Generator().manual_seed(seed)
    head_dim, heads, num_topics = 32, 3, 12
    topics = torch.randn(num_topics, head_dim, generator=torch.Generator().manual_seed(99))
    runs = torch.randint(num_topics, (length // 32,), generator=generator).repeat_interleave(32)

    def rows(strength: float, count: int) -> torch.Tensor:
        noise = torch.randn(length, count, head_dim, generator=generator)
        return (strength * topics[runs][:, None] + noise).bfloat16()

    # One KV head for three query heads; their noise makes them differ.
    query = rows(1.0, heads) * torch.tensor([0.6, 1.0, 1.6])[:, None]
    value = torch.randn(length, 1, head_dim, generator=generator).bfloat16()
    return LayerTensors(query.bfloat16(), rows(1.0, 1), value, head_dim**-0.5)


def hidden(length: int, seed: int) -> LayerTensors:
    """The same with every eighth block's keys and all queries in pairs that cancel.

    Every row finds its keys there, but neither the blocks' means nor the mean queries show it.
    The second block is the first of them, so that most rows of a short window are far from one.
    """
    layer = clustered(length, seed)
    direction = torch.zeros(layer.key.shape[2])
    direction[0] = 18.0
    signs = torch.tensor([1.0, -1.0]).repeat(length // 2)[:, None, None]
    in_eighth = (torch.arange(length) // 32 % 8 == 1)[:, None, None]
    key = torch.where(in_eighth, signs * direction, layer.key.float()).bfloat16()
    query = layer.query.clone()
    query[..., 0] = 2.0 * signs[..., 0]
    return LayerTensors(query, key, layer.value, layer.softmax_scale)


def captured(
    directory: Path, length: int, *layers_of: Callable[[int, int], LayerTensors]
) -> Capture:
    """The calibration window is of the first kind, and each kind has its held-out windows."""
    taken = Capture(directory, (0,), held_out(len(layers_of)))
    kinds = {"calibration": layers_of[0]}
    for layer_of, windows in zip(layers_of, by_text(taken.held_out), strict=True):
        kinds |= dict.fromkeys(windows, layer_of)
    for seed, (window, layer_of) in enumerate(kinds.items()):
        layer = layer_of(length, seed)
        tensors = {"query": layer.query, "key": layer.key, "value": layer.value}
        save_file(
            tensors, taken.path(0, window), metadata={"softmax_scale": str(layer.softmax_scale)}
        )
    return taken
