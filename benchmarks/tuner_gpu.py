"""The tuner on Llama-3.1-8B's shapes: 32 layers of 32 heads, contexts to 32K, on a GPU.

    python -m benchmarks.tuner_gpu --output results.csv

No weights of that size come without a model hub, so the job's two stages are timed apart:

- *capture* runs a body of Llama-3.1-8B's shape with random weights, on which its time does not
  depend, over the job's windows, and writes every layer's Q, K and V to disk.
- *search* tunes all layers on tensors made of a real model's: SmolLM2-135M, its rotary embedding
  stretched to 32K (YaRN), reads the demo's text, and each head of 128 is a pair of its heads of 64
  side by side, so that a score is the sum of the two's. Layers past its 30th repeat the first.

Loading 16 GB of weights is in neither.
"""

import itertools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.command import benchmark_parser, report_rows
from benchmarks.serving_gpu import LLAMA_8B
from vllm_afbs.captures import CALIBRATION, Capture, LayerTensors
from vllm_afbs.commands.results import Row, make_row
from vllm_afbs.commands.tuning_options import DEFAULT_BLOCK_Q
from vllm_afbs.demo.assets import prepare
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.recorder import ATTENTION, Recorder
from vllm_afbs.models.in_process.source import SourceModel, open_model
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import HeadProfile
from vllm_afbs.tuning.capture import capture
from vllm_afbs.tuning.device import compute_device, default_block_k
from vllm_afbs.tuning.journal import FILE_NAME, Journal
from vllm_afbs.tuning.search.layer import LayerSearch
from vllm_afbs.tuning.search.scorer import SearchSettings
from vllm_afbs.tuning.texts import read_texts
from vllm_afbs.tuning.windows import cut_windows, held_out

NUM_LAYERS, NUM_KV_HEADS, GROUP = 32, 8, 4


@dataclass(frozen=True)
class PairedCapture(Capture):
    """Heads in pairs side by side, as many as Llama-3.1-8B has."""

    def load(self, layer: int, window: str) -> LayerTensors:
        """Pairs the heads of the layer, or of the one that it repeats."""
        small = super().load(layer % len(self.layers), window).to(compute_device())
        num_kv_heads = small.key.shape[1]
        group = small.query.shape[1] // num_kv_heads
        kv_pairs = list(itertools.product(range(num_kv_heads), repeat=2))[:NUM_KV_HEADS]
        in_group = list(itertools.product(range(group), repeat=2))[:GROUP]
        query_pairs = [
            (a * group + i, b * group + j) for a, b in kv_pairs for i, j in in_group
        ]  # fmt: skip
        return LayerTensors(
            _paired(small.query, query_pairs),
            _paired(small.key, kv_pairs),
            _paired(small.value, kv_pairs),
            small.softmax_scale,
        )


def _paired(rows: torch.Tensor, pairs: Sequence[tuple[int, ...]]) -> torch.Tensor:
    return torch.cat([rows[:, list(side)] for side in zip(*pairs, strict=True)], dim=-1)


def stretched(model: SourceModel, length: int) -> SourceModel:
    """The model with positions to ``length`` by YaRN."""
    config = model.config
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "yarn",
        "factor": length / model.max_length,
        "original_max_position_embeddings": model.max_length,
    }
    config.max_position_embeddings = length
    return replace(model, config=config, max_length=length)


def capture_seconds(directory: Path, length: int) -> float:
    """Runs a body of Llama-3.1-8B's shape over every window; seconds, writing included."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**{**LLAMA_8B, "max_position_embeddings": length})
    device = compute_device()
    with torch.device(device):
        body = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    taken = Capture(directory, tuple(range(config.num_hidden_layers)), held_out(1))
    shape = ModelFingerprint.from_config(config)
    tokens = [(7 * i) % config.vocab_size for i in range(length)]
    start = time.perf_counter()
    for window in (CALIBRATION, *taken.held_out):
        Recorder(taken, shape, window, lambda _: None).run(body.eval(), tokens)
    return time.perf_counter() - start


def search(taken: Capture, settings: SearchSettings, num_layers: int) -> list[Row]:
    """Tunes every layer, and says what it took and found."""
    heads: list[HeadProfile] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / FILE_NAME, {})
        for layer in track(range(num_layers), "search"):
            layer_search = LayerSearch(settings, layer, taken, journal, lambda _: None)
            heads += layer_search.settled([settings.tolerance])[settings.tolerance]
        spent = {name: journal.total(name) / len(heads) for name in ("evaluations", "cost")}
    seconds = time.perf_counter() - start
    measured = [head.validation for head in heads if head.validation is not None]
    figures = {
        ("search", "seconds"): [seconds],
        ("evaluations a head", "count"): [spent["evaluations"]],
        ("cost a head", "full evaluations"): [spent["cost"]],
        ("sparse heads", "ratio"): [sum(head.tau < 1 for head in heads) / len(heads)],
        ("sparsity on held-out text", "ratio"): [each.sparsity for each in measured],
        ("error on held-out text", "relative L1"): [each.error for each in measured],
    }
    shape = f"L{settings.longest}-{num_layers} layers-{len(heads) // num_layers} heads"
    return [make_row(what, shape, values, unit) for (what, unit), values in figures.items()]


def main() -> None:
    """Runs both stages."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--layers", type=int, default=NUM_LAYERS)
    parser.add_argument("--tolerance", type=float, default=0.05)
    args = parser.parse_args()
    blocks = DEFAULT_BLOCK_Q, default_block_k()
    settings = SearchSettings(sorted(args.lengths), args.tolerance, *blocks, seed=0)
    assets = prepare()
    model = stretched(open_model(str(assets.model_dir)), settings.longest)
    windows = cut_windows(
        model.tokenizer(), read_texts([assets.calibration_file]), settings.longest
    ).windows
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        layers = range(model.fingerprint.num_layers)
        small = capture(
            model, TransformersEngine(model), windows, layers, Path(folder), lambda _: None
        )
        paired = PairedCapture(small.directory, small.layers, small.held_out)
        rows = search(paired, settings, args.layers)
        report_rows(rows, args.output)
        directory = Path(folder) / "capture"
        directory.mkdir()
        seconds = capture_seconds(directory, settings.longest)
        shape = f"L{settings.longest}-Llama-3.1-8B's shape-{len(windows)} windows"
        report_rows([make_row("capture", shape, [seconds], "seconds"), *rows], args.output)


if __name__ == "__main__":
    main()
