"""The evaluation's options."""

import argparse
from pathlib import Path

from vllm_afbs.commands.arguments import add_model_options, positive

TESTS = ("perplexity", "prefixes", "agreement", "retrieval")


def evaluation_parser(program: str) -> argparse.ArgumentParser:
    """Makes the parser of the evaluation's command line.

    Args:
        program: The command's name, for its messages.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} MODEL --profile FILE --output FILE [option ...] "
        "[argument of vllm serve ...]",
        allow_abbrev=False,
        description="Measure how much quality a model loses with a profile, compared with the same "
        "model run dense.",
    )
    add_model_options(parser, "the checkpoint that the profile was tuned for: directory or hub id")
    parser.add_argument("--profile", required=True, type=Path, help="the profile to evaluate")
    parser.add_argument(
        "--level",
        metavar="NAME",
        help="the level of the profile to evaluate (default: the profile's default, or with "
        "--server the one that it serves)",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        help="the JSON file to write; a CSV and an SVG of the same name are written beside it",
    )
    parser.add_argument(
        "--text",
        type=Path,
        help="text that the profile was not tuned on, of any kind that --calibration of "
        "vllm_afbs.tune takes (default: the part of Python's language reference that the demo does "
        "not tune on)",
    )
    parser.add_argument(
        "--text-column",
        metavar="NAME",
        help="the column of the text's rows that holds the text or the chat (default: text, else "
        "messages or conversations)",
    )
    parser.add_argument(
        "--length",
        type=positive,
        help="tokens of the longest prompt with its answer (default: the longest context of the "
        "profile that the servers take)",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="ask a running server with this profile instead of running the model here; if the "
        "server needs an API key, set VLLM_API_KEY",
    )
    parser.add_argument(
        "--dense-server",
        metavar="URL",
        help="ask a stock server of the same model for the dense reference (default: run it here)",
    )
    parser.add_argument(
        "--tests", nargs="+", choices=TESTS, default=list(TESTS), help="run these (default: all)"
    )
    parser.add_argument(
        "--windows",
        type=positive,
        default=4,
        help="windows of text to measure perplexity on, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--prefixes",
        type=positive,
        default=64,
        help="prompts whose next token is scored (default: %(default)s)",
    )
    parser.add_argument(
        "--continuations",
        type=positive,
        default=16,
        help="prompts that are continued greedily (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens",
        type=positive,
        default=64,
        help="tokens of each continuation (default: %(default)s)",
    )
    parser.add_argument(
        "--per-task",
        type=positive,
        default=11,
        help="prompts of each retrieval task, at evenly spaced depths (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of all that is drawn at random (default: %(default)s)",
    )
    return parser
