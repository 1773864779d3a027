"""Types of command-line arguments; imports nothing heavy, for what is refused before the rest."""

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number expected, got {text}")
    return value
