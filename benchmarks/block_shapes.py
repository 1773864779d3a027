"""Compares shapes of blocks by the sparsity they reach at equal error, on a real model's heads.

    python -m benchmarks.block_shapes --output results.csv

The served selector chooses blocks at a grid of tau, and each head's sparsity is read where its
relative L1 error against dense attention is 0.05. Sparsity is the share of the causal area in
blocks of 128x128 that is skipped, whatever the shape, so that shapes compare. Beside the shapes:

- *scored one by one*: the served selector scores query blocks of 64 rows in pairs; this one scores
  each on its own.
- *dropped by mean*: a dropped block counts as its mean key and its mean value.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from benchmarks.command import benchmark_parser, report_rows
from vllm_afbs.captures import CALIBRATION, LayerTensors
from vllm_afbs.commands.results import Row, make_row, write_rows
from vllm_afbs.demo.assets import prepare
from vllm_afbs.kernels import THETA_OFF, BlockGeometry, HeadThresholds, score_blocks
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import cut_windows

ERROR = 0.05
PART = 64  # keys of the finest block
ROWS = 512  # rows whose error is measured
DEPTHS = np.linspace(0.2, 5.8, 15)  # of tau: -log(1 - tau)


class _OneByOne(BlockGeometry):
    """Blocks that are never scored in pairs."""

    @property
    def scored(self) -> BlockGeometry:
        """Themselves."""
        return self


@dataclass(frozen=True)
class Variant:
    """A way to cut, score and drop blocks.

    Attributes:
        block_q: Rows of a query block.
        block_k: Keys of a key block.
        in_pairs: Whether blocks of 64 rows are scored in pairs, as served.
        corrects: Whether a dropped block counts as its mean key and its mean value.
    """

    block_q: int
    block_k: int
    in_pairs: bool = True
    corrects: bool = False

    @property
    def name(self) -> str:
        """Its name in the results."""
        name = f"{self.block_q}x{self.block_k}"
        if not self.in_pairs:
            name += ", scored one by one"
        return name + (", dropped by mean" if self.corrects else "")

    def geometry(self, length: int) -> BlockGeometry:
        """Cuts a prompt."""
        kind = BlockGeometry if self.in_pairs else _OneByOne
        return kind(length, length, self.block_q, self.block_k)


VARIANTS = (
    Variant(128, 128),
    Variant(128, 64),
    Variant(64, 128),
    Variant(64, 64),
    Variant(64, 128, in_pairs=False),
    Variant(64, 64, in_pairs=False),
    Variant(128, 128, corrects=True),
    Variant(64, 64, corrects=True),
)


class Layer:
    """One layer's attention at some rows, as sums over parts of ``PART`` keys."""

    def __init__(self, tensors: LayerTensors) -> None:
        """Computes the sums, in fp32."""
        self._tensors = tensors
        length, num_heads, _ = tensors.query.shape
        self._group = num_heads // tensors.key.shape[1]
        step = max(1, length // ROWS)
        self._rows = torch.arange(step - 1, length, step)
        self._query = tensors.query[self._rows].float().transpose(0, 1) * tensors.softmax_scale
        key, value = self._by_head(tensors.key), self._by_head(tensors.value)
        scores = self._query @ key.transpose(1, 2)
        scores.masked_fill_(torch.arange(length) > self._rows[:, None], -torch.inf)
        self._shift = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - self._shift).unflatten(-1, (-1, PART))
        self._weight = weights.sum(-1)
        parts = value.unflatten(1, (-1, PART))
        self._value = torch.einsum("hrbk,hbkd->hrbd", weights, parts)
        self._dense = self._value.sum(2) / self._weight.sum(2)[..., None]

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float().transpose(0, 1).repeat_interleave(self._group, 0)

    def curve(self, variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
        """Error and sparsity of each head by depth, ``[len(DEPTHS), num_heads]``."""
        tensors = self._tensors
        length, num_heads, _ = tensors.query.shape
        geometry = variant.geometry(length)
        scores = score_blocks(tensors.query, tensors.key, geometry, tensors.softmax_scale)
        dense_area = BlockGeometry(length, length, 128, 128).num_visible * 128 * 128
        errors, sparsities = [], []
        for depth in DEPTHS:
            tau = torch.full((num_heads,), 1 - float(np.exp(-depth)))
            thresholds = HeadThresholds(tau, torch.full_like(tau, THETA_OFF))
            keep = scores.select(thresholds, geometry)
            errors.append(self._error(keep, geometry, variant.corrects))
            area = keep.sum((1, 2)) * variant.block_q * variant.block_k
            sparsities.append(1 - area / dense_area)
        return torch.stack(errors), torch.stack(sparsities)

    def _error(self, keep: torch.Tensor, geometry: BlockGeometry, corrects: bool) -> torch.Tensor:
        kept = keep[:, self._rows // geometry.block_q]
        parts = kept.repeat_interleave(geometry.block_k // PART, -1).float()
        weight = (parts * self._weight).sum(-1)
        value = (parts[:, :, None] @ self._value)[:, :, 0]
        if corrects:
            visible = geometry.visible[self._rows // geometry.block_q]
            key_mean, value_mean = (
                self._by_head(rows).unflatten(1, (-1, geometry.block_k)).mean(2)
                for rows in (self._tensors.key, self._tensors.value)
            )
            means = torch.exp(self._query @ key_mean.transpose(1, 2) - self._shift)
            means *= geometry.block_k * (~kept & visible)
            weight += means.sum(-1)
            value += means @ value_mean
        difference = (value / weight[..., None] - self._dense).abs().sum((1, 2))
        relative: torch.Tensor = difference / self._dense.abs().sum((1, 2))
        return relative


def sparsity_at(errors: torch.Tensor, sparsities: torch.Tensor) -> list[float]:
    """Each head's sparsity at ``ERROR``, interpolated over the logarithm of the error."""
    found = []
    for error, sparsity in zip(errors.T, sparsities.T, strict=True):
        order = error.argsort()
        logs = error[order].clamp_min(1e-9).log()
        found.append(float(np.interp(np.log(ERROR), logs.numpy(), sparsity[order].numpy())))
    return found


def measure(load: Callable[[int], LayerTensors], layers: list[int], length: int) -> list[Row]:
    """Measures every variant over the heads of these layers."""
    reached: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    for index in track(layers, "layers"):
        layer = Layer(load(index))
        for variant in VARIANTS:
            reached[variant.name] += sparsity_at(*layer.curve(variant))
    base = reached[VARIANTS[0].name]
    shape = f"L{length}-{len(base)} heads of {len(layers)} layers-error{ERROR}"
    rows = []
    for name, values in reached.items():
        gains = [value - start for value, start in zip(values, base, strict=True)]
        rows += [
            make_row(f"{name}: sparsity", shape, values, "share"),
            make_row(f"{name}: gain over {VARIANTS[0].name}", shape, gains, "share"),
            make_row(f"{name}: mean gain", shape, [float(np.mean(gains))], "share"),
        ]
    return rows


def main() -> None:
    """Runs the comparison on the demo's model and text."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=(4096, 8192))
    parser.add_argument("--every", type=int, default=3, help="take every n-th layer")
    args = parser.parse_args()
    assets = prepare()
    model = open_model(str(assets.model_dir))
    rows: list[Row] = []
    for length in args.lengths:
        cut = cut_windows(model.tokenizer(), read_texts([assets.calibration_file]), length)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            layers = list(range(0, model.fingerprint.num_layers, args.every))
            taken = capture(
                model, TransformersEngine(model), cut.windows, layers, Path(folder), lambda _: None
            )
            load = functools.partial(taken.load, window=CALIBRATION)
            rows += measure(load, layers, length)
        if args.output:
            write_rows(args.output, rows)  # a long run that is cut off keeps what it has
    report_rows(rows, args.output)


if __name__ == "__main__":
    main()
