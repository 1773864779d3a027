"""The tuner's default blocks, held against what was measured of other shapes."""

import csv
from pathlib import Path

import pytest

from vllm_afbs.backends.cuda.dispatch import measurements
from vllm_afbs.commands.tuning_options import DEFAULT_BLOCK_K, DEFAULT_BLOCK_Q, tuning_parser
from vllm_afbs.cost_models import CardCost
from vllm_afbs.tuning.cost import AttentionTime

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SHAPE = f"{DEFAULT_BLOCK_Q}x{DEFAULT_BLOCK_K}"


def rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


GAIN = min(float(row["p50"]) for row in rows("block_shapes.csv")
           if row["what"] == f"{SHAPE}: mean gain")  # fmt: skip
"""What the default skips more than 128x128 at equal error, as a share of dense attention."""


def test_these_are_the_blocks_of_a_command_line_that_names_none() -> None:
    options = tuning_parser("tune").parse_args(["--model", "m", "--output", "p.json"])
    assert (options.block_q, options.block_k) == (DEFAULT_BLOCK_Q, DEFAULT_BLOCK_K)


@pytest.mark.parametrize("card", measurements())
def test_every_measured_card_is_predicted_to_gain_by_them(card: str) -> None:
    for head_dim in (64, 128, 256):
        default, coarse = (
            AttentionTime(CardCost(card, block_q, block_k), head_dim, 32)
            for block_q, block_k in ((DEFAULT_BLOCK_Q, DEFAULT_BLOCK_K), (128, 128))
        )
        for length in (8192, 32768, 131072):
            for density in (0.3, 0.2, 0.1):
                gained = default.of_layer(length, density - GAIN)
                assert gained < coarse.of_layer(length, density), (head_dim, length, density)


@pytest.mark.parametrize("heads", ["H9/3-D64", "H6/1-D128"])
def test_a_cpu_gains_by_them(heads: str) -> None:
    def seconds(shape: str, sparsity: float) -> float:
        (found,) = [
            float(row["p50"])
            for row in rows("prefill_cpu_blocks.csv")
            if (row["what"], row["shape"]) == (f"sparse {sparsity}", f"L8192-{heads}-vec{shape}")
        ]
        return found

    finer, finest = (seconds(f"-block{SHAPE}", sparsity) for sparsity in (0.8, 0.9))
    at_equal_error = finer - GAIN / 0.1 * (finer - finest)
    assert at_equal_error < seconds("", 0.8)
