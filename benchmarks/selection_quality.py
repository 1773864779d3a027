"""Compares scores of blocks at equal density, on a real model's heads.

    python -m benchmarks.selection_quality --output results.csv

Every score is turned into blocks by the same rule: the fewest blocks that reach tau, and the blocks
that are always kept. Tau is set for each head so that the density is reached. The scores are:

- *mean keys*: softmax over (mean of the query block) x (mean of the key block), as in SpargeAttn.
- *every key*: softmax over (mean of the query block) x (each key), summed by block.
- *served*: half of each.
- *token Q*: the mean over the block's rows of each row's softmax over the key blocks' means.
- *oracle*: the exact attention mass of the key blocks, averaged over the rows.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.command import benchmark_parser, report_rows
from vllm_afbs.captures import CALIBRATION, LayerTensors
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.demo.assets import prepare
from vllm_afbs.kernels import MEAN_KEY_SHARE, BlockGeometry, pool_keys
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import cut_windows

BLOCK = 128
DENSITIES = (0.5, 0.3, 0.2)
SAMPLED_BLOCKS = 16


class Rows:
    """Sampled query blocks of one layer, with their exact attention and each score's masses."""

    def __init__(self, tensors: LayerTensors, geometry: BlockGeometry) -> None:
        """Computes the masses, in fp32."""
        step = max(1, geometry.num_q_blocks // SAMPLED_BLOCKS)
        self.sampled = range(step - 1, geometry.num_q_blocks, step)
        self.geometry = geometry
        group = tensors.query.shape[1] // tensors.key.shape[1]
        self._query = tensors.query.float().transpose(0, 1) * tensors.softmax_scale
        self._key, self._value = (
            rows.float().transpose(0, 1).repeat_interleave(group, 0)
            for rows in (tensors.key, tensors.value)
        )
        self._key_means = pool_keys(tensors.key, geometry).mean.repeat_interleave(group, 0)
        self.visible = geometry.visible[list(self.sampled)]
        self.always = geometry.always[list(self.sampled)]
        parts = [self._masses(i) for i in self.sampled]
        self.masses = {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}

    def _scores(self, i: int) -> torch.Tensor:
        start, stop = i * BLOCK, (i + 1) * BLOCK
        scores = self._query[:, start:stop] @ self._key[:, :stop].transpose(1, 2)
        hidden = torch.arange(stop)[None, :] > torch.arange(start, stop)[:, None]
        return scores.masked_fill_(hidden, -torch.inf)

    def _masses(self, i: int) -> dict[str, torch.Tensor]:
        query = self._query[:, i * BLOCK : (i + 1) * BLOCK]
        means = self._key_means[:, : i + 1].transpose(1, 2)
        pooled = query.mean(1, keepdim=True)
        keys = self._key[:, : (i + 1) * BLOCK].transpose(1, 2)
        by_mean = torch.softmax(pooled @ means, -1)[:, 0]
        by_key = _by_block(torch.softmax(pooled @ keys, -1))[:, 0]
        masses = {
            "mean keys": by_mean,
            "every key": by_key,
            "served": torch.lerp(by_key, by_mean, MEAN_KEY_SHARE),
            "token Q": torch.softmax(query @ means, -1).mean(1),
            "oracle": _by_block(torch.softmax(self._scores(i), -1)).mean(1),
        }
        behind = self.geometry.num_k_blocks - (i + 1)
        return {n: torch.nn.functional.pad(mass, (0, behind)) for n, mass in masses.items()}

    def keep(self, name: str, tau: torch.Tensor) -> torch.Tensor:
        """Chooses blocks for each head and sampled row, at the head's tau."""
        ordered, order = self.masses[name].sort(dim=-1, descending=True, stable=True)
        needed = ordered.cumsum(-1) - ordered < tau[:, None, None]
        keep = torch.zeros_like(needed).scatter_(-1, order, needed)
        return (keep | self.always) & self.visible

    def keep_at(self, name: str, density: float) -> torch.Tensor:
        """Chooses blocks at the largest tau of each head that keeps at most this density."""
        low = torch.zeros(len(self._query))
        high = torch.ones(len(self._query))
        for _ in range(20):
            middle = (low + high) / 2
            dense = self.keep(name, middle).sum((1, 2)) / self.visible.sum()
            low = torch.where(dense <= density, middle, low)
            high = torch.where(dense <= density, high, middle)
        return self.keep(name, low)

    def errors(self, keeps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Computes each head's relative L1 error against dense attention, by selection."""
        difference = {name: torch.zeros(len(self._query)) for name in keeps}
        magnitude = torch.zeros(len(self._query))
        for row, i in enumerate(self.sampled):
            scores, value = self._scores(i), self._value[:, : (i + 1) * BLOCK]
            dense = torch.softmax(scores, -1) @ value
            magnitude += dense.abs().sum((1, 2))
            for name, keep in keeps.items():
                dropped = ~keep[:, row, : i + 1].repeat_interleave(BLOCK, -1)[:, None]
                sparse = torch.softmax(scores.masked_fill(dropped, -torch.inf), -1) @ value
                difference[name] += (sparse - dense).abs().sum((1, 2))
        return {name: each / magnitude for name, each in difference.items()}


def _by_block(weights: torch.Tensor) -> torch.Tensor:
    by_block: torch.Tensor = torch.unflatten(weights, -1, (-1, BLOCK))
    return by_block.sum(-1)


def measure(
    load: Callable[[int], LayerTensors], layers: list[int], geometry: BlockGeometry
) -> list[Row]:
    """Measures the errors of each selection over the heads of these layers."""
    errors: dict[str, list[float]] = {}
    for layer in track(layers, "layers"):
        rows = Rows(load(layer), geometry)
        keeps = {
            f"{name} at density {density}": rows.keep_at(name, density)
            for density in DENSITIES
            for name in rows.masses
        }
        for name, each in rows.errors(keeps).items():
            errors.setdefault(name, []).extend(each.tolist())
    heads = len(next(iter(errors.values())))
    shape = f"L{geometry.kv_len}-{heads} heads of {len(layers)} layers-block{BLOCK}"
    return [make_row(f"{name}: error", shape, each, "relative L1") for name, each in errors.items()]


def main() -> None:
    """Runs the comparison on the demo's model and text."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--every", type=int, default=3, help="take every n-th layer")
    args = parser.parse_args()
    assets = prepare()
    model = open_model(str(assets.model_dir))
    cut = cut_windows(model.tokenizer(), read_texts([assets.calibration_file]), args.length)
    geometry = BlockGeometry(args.length, args.length, BLOCK, BLOCK)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        layers = list(range(0, model.fingerprint.num_layers, args.every))
        taken = capture(
            model, TransformersEngine(model), cut.windows, layers, Path(folder), lambda _: None
        )
        load = functools.partial(taken.load, window=CALIBRATION)
        rows = measure(load, layers, geometry)
    report_rows(rows, args.output)


if __name__ == "__main__":
    main()
