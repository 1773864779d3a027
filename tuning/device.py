"""Where the tuner computes."""

import torch


def compute_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_block_k() -> int:
    """Keys of a key block if the user names none: 64 on a CPU, 128 on a GPU.

    At equal divergence of the whole model, key blocks of 64 compute 0.5 to 4 points less of
    attention. A CPU's products take as long with them. An H200 takes 5 to 10 % longer per product,
    which at the usual densities is as much as they save (docs/benchmarks.md, "Default blocks").
    """
    return 64 if compute_device().type == "cpu" else 128
