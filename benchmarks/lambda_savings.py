"""How many products with V lambda could skip after tau has chosen the blocks, on real heads.

    python -m benchmarks.lambda_savings --output results.csv

The paper's third threshold skips the product of a kept block with V if all of the block's scores
lie far under the maximum so far. Here each head's tau allows a relative L1 error of 0.05, and key
blocks are visited in ascending order, as in the kernel. A product with V is half of a block's work,
so half of the share is what a kernel could save. The profile has no lambda because of these rows.
"""

import tempfile
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.command import benchmark_parser, report_rows
from vllm_afbs.captures import CALIBRATION, LayerTensors
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.demo.assets import prepare
from vllm_afbs.kernels import THETA_OFF, BlockGeometry, HeadThresholds, score_blocks
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import cut_windows

TOLERANCE = 0.05
SHAPES = ((128, 128), (128, 64), (64, 64))
LAMBDAS = (-3.0, -4.0, -5.0, -6.0)
SAMPLED_BLOCKS = 8
HALVINGS = 12


class Rows:
    """Sampled query blocks of one layer: their exact scores, and what a choice of blocks does."""

    def __init__(self, tensors: LayerTensors, geometry: BlockGeometry) -> None:
        """Scores the blocks for selection; attention is computed when it is asked for."""
        self.geometry = geometry
        step = max(1, geometry.num_q_blocks // SAMPLED_BLOCKS)
        self.sampled = range(step - 1, geometry.num_q_blocks, step)
        query, key = tensors.query, tensors.key
        self.num_heads = query.shape[1]
        self._selector = score_blocks(query, key, geometry, tensors.softmax_scale)
        self._query = query.float().transpose(0, 1) * tensors.softmax_scale
        group = self.num_heads // key.shape[1]
        self._key, self._value = (
            rows.float().transpose(0, 1).repeat_interleave(group, 0)
            for rows in (key, tensors.value)
        )
        attended = [
            torch.softmax(self._scores(i), -1) @ self._value[:, : self._end(i)]
            for i in self.sampled
        ]
        self._dense = dict(zip(self.sampled, attended, strict=True))
        self._magnitude = sum(each.abs().sum((1, 2)) for each in attended)

    def _end(self, i: int) -> int:
        return (i + 1) * self.geometry.block_q

    def _scores(self, i: int) -> torch.Tensor:
        stop = self._end(i)
        start = stop - self.geometry.block_q
        scores = self._query[:, start:stop] @ self._key[:, :stop].transpose(1, 2)
        hidden = torch.arange(stop)[None, :] > torch.arange(start, stop)[:, None]
        return scores.masked_fill_(hidden, -torch.inf)

    def keep(self, tau: torch.Tensor) -> torch.Tensor:
        """The served selection, ``[num_heads, num_q_blocks, num_k_blocks]``."""
        theta = torch.full_like(tau, THETA_OFF)
        return self._selector.select(HeadThresholds(tau, theta), self.geometry)

    def skipping(self, keep: torch.Tensor, lambda_: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each head's relative L1 error, and the share of kept blocks whose product is skipped.

        Args:
            keep: Blocks to attend to, as from ``keep``.
            lambda_: The threshold; minus infinity skips nothing.
        """
        difference = torch.zeros(self.num_heads)
        skipped, kept = torch.zeros(self.num_heads), torch.zeros(self.num_heads)
        block_k = self.geometry.block_k
        for i in self.sampled:
            chosen = keep[:, i, : self._end(i) // block_k]
            dropped = ~chosen.repeat_interleave(block_k, -1)[:, None]
            scores = self._scores(i).masked_fill_(dropped, -torch.inf)
            local_max = scores.unflatten(-1, (-1, block_k)).amax(-1)
            below = (local_max - local_max.cummax(-1).values).nan_to_num_(-torch.inf).amax(1)
            skip = chosen & (below < lambda_)
            weights = torch.softmax(scores, -1)
            weights.masked_fill_(skip.repeat_interleave(block_k, -1)[:, None], 0.0)
            output = weights @ self._value[:, : self._end(i)]
            difference += (output - self._dense[i]).abs().sum((1, 2))
            skipped += skip.sum(-1)
            kept += chosen.sum(-1)
        return difference / self._magnitude, skipped / kept

    def tau_within(self, tolerance: float) -> torch.Tensor:
        """The least tau of each head whose error is within the tolerance, by halving."""
        low, high = torch.zeros(self.num_heads), torch.ones(self.num_heads)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            error, _ = self.skipping(self.keep(middle), -torch.inf)
            low = torch.where(error > tolerance, middle, low)
            high = torch.where(error > tolerance, high, middle)
        return high


def measure(
    tensors: LayerTensors, length: int, shape: tuple[int, int]
) -> dict[float, torch.Tensor]:
    """By lambda, the share skipped and the added error of each head, ``[2, num_heads]``."""
    rows = Rows(tensors, BlockGeometry(length, length, *shape))
    keep = rows.keep(rows.tau_within(TOLERANCE))
    before, _ = rows.skipping(keep, -torch.inf)
    found = {}
    for lambda_ in LAMBDAS:
        error, share = rows.skipping(keep, lambda_)
        found[lambda_] = torch.stack([share, error - before])
    return found


def main() -> None:
    """Runs the measurement on the demo's model and text."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--every", type=int, default=6, help="take every n-th layer")
    args = parser.parse_args()
    assets = prepare()
    model = open_model(str(assets.model_dir))
    cut = cut_windows(model.tokenizer(), read_texts([assets.calibration_file]), args.length)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        layers = list(range(1, model.fingerprint.num_layers, args.every))
        engine = TransformersEngine(model)
        taken = capture(model, engine, cut.windows, layers, Path(folder), lambda _: None)
        for shape in SHAPES:
            of_layers = [
                measure(taken.load(layer, window=CALIBRATION), args.length, shape)
                for layer in track(layers, f"blocks {shape}")
            ]
            name = f"L{args.length}-{len(layers)} layers-block{shape[0]}x{shape[1]}"
            for lambda_ in LAMBDAS:
                share, added = torch.cat([each[lambda_] for each in of_layers], 1)
                what = f"lambda {lambda_:g}"
                mean = [float(share.mean())]
                found.append(make_row(f"{what}: skipped of the kept products", name, mean, "ratio"))
                mean = [float(added.mean())]
                found.append(make_row(f"{what}: added error", name, mean, "relative L1"))
    report_rows(found, args.output)


if __name__ == "__main__":
    main()
