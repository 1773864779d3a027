"""The tuner's default blocks, held against what was measured of other shapes."""

import csv
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from vllm_afbs.backends.cuda.dispatch import measurements
from vllm_afbs.commands.tuning_options import DEFAULT_BLOCK_Q, tuning_parser
from vllm_afbs.cost_models import CardCost
from vllm_afbs.tuning.cost import AttentionTime
from vllm_afbs.tuning.device import default_block_k

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


GAIN = min(float(row["p50"]) for row in rows("block_shapes.csv")
           if row["what"] == "128x64: mean gain")  # fmt: skip
"""What key blocks of 64 skip more than 128x128 at equal error, as a share of dense attention."""


def test_a_command_line_need_not_name_blocks() -> None:
    options = tuning_parser("tune").parse_args(["--model", "m", "--output", "p.json"])
    assert (options.block_q, options.block_k) == (DEFAULT_BLOCK_Q, None)
    for has_gpu, expected in ((False, 64), (True, 128)):
        with patch.object(torch.cuda, "is_available", lambda has=has_gpu: has):
            assert default_block_k() == expected


@pytest.mark.parametrize("length", [8192, 32768, 131072])
def test_a_card_does_not_gain_by_key_blocks_of_64(length: int) -> None:
    """Heads of 128 by tiles: within 10 % of the time of 128x128 at equal error, on either side."""
    (card,) = (each for each in measurements() if each == "sm90-fa3")
    finer, coarse = (AttentionTime(CardCost(card, 128, block_k), 128, 32) for block_k in (64, 128))
    for density in (0.3, 0.2):
        ratio = finer.of_layer(length, density - GAIN) / coarse.of_layer(length, density)
        assert 0.9 < ratio < 1.1, (length, density, ratio)


@pytest.mark.parametrize("heads", ["H9/3-D64", "H6/1-D128"])
def test_a_cpu_gains_by_key_blocks_of_64(heads: str) -> None:
    def seconds(shape: str, sparsity: float) -> float:
        (found,) = [
            float(row["p50"])
            for row in rows("prefill_cpu_blocks.csv")
            if (row["what"], row["shape"]) == (f"sparse {sparsity}", f"L8192-{heads}-vec{shape}")
        ]
        return found

    finer, finest = (seconds("-block128x64", sparsity) for sparsity in (0.8, 0.9))
    at_equal_error = finer - GAIN / 0.1 * (finer - finest)
    assert at_equal_error < seconds("", 0.8)
