"""The command line: ``python -m vllm_afbs.check --model MODEL --profile profile.json``.

Imports vLLM only once it is known to be installed, and turns its log down: about a broken plugin
it logs tracebacks.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_afbs import compat
from vllm_afbs.commands.extras import missing_engine
from vllm_afbs.commands.faults import guarded
from vllm_afbs.commands.ranges import shortened
from vllm_afbs.serving.settings import PROFILE_VARIABLE

if TYPE_CHECKING:
    from vllm_afbs.check.layers import Answer

_PROGRAM = "vllm-afbs-check"
EXIT_ON, EXIT_OFF, EXIT_BAD_INPUT = 0, 1, 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: some layers would run sparse or, without a model, the plugins load. 1: nothing would run
    sparse; the last line says why. 2: a server would not start with what was given, for the reason
    in one line. 70: a fault of ours. The traceback of a fault, and of what vLLM's own code refuses,
    is kept in a file.
    """
    options, serve_arguments = _parser().parse_known_args(arguments)
    return guarded(_PROGRAM, lambda: _run(options, serve_arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        usage="python -m vllm_afbs.check [--model MODEL] [--profile FILE] [ARGUMENT ...]",
        description="Say whether sparse attention would be on: which plugins vLLM loads, and which "
        "layers of a model would run sparse on this machine. Nothing is loaded or started.",
        epilog="Every other argument is one of vllm serve: give what your server gets.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="the model to serve: a directory or a hub id")
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help=f"the profile to serve (default: {PROFILE_VARIABLE}, as for a server)",
    )
    return parser


def _run(options: argparse.Namespace, serve_arguments: Sequence[str]) -> int:
    if reason := missing_engine():
        return _refuse(reason)
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
        logging.getLogger("vllm").setLevel(logging.CRITICAL)  # until vLLM sets its log up
    if options.profile is not None:
        os.environ[PROFILE_VARIABLE] = options.profile
    if not _plugins_work():
        return EXIT_OFF
    if options.model is None and not serve_arguments:
        print("on: vLLM knows --attention-backend afbs; give --model to see its layers")
        return EXIT_ON
    from vllm_afbs.check.refusals import RefusedError

    try:
        return _check_layers(options.model, serve_arguments)
    except RefusedError as error:
        return _refuse(str(error))


def _plugins_work() -> bool:
    """Prints what vLLM loads; whether it knows our backend afterwards."""
    from vllm_afbs.check import plugins

    try:
        platform = compat.active_platform()
    except Exception as error:  # vLLM does not import, or refuses to choose among platforms
        platform, failure = None, plugins.one_line(error)
    else:
        failure = f"vLLM took the platform {platform}, which knows no --attention-backend afbs"
        print(f"vLLM {compat.installed_version()}, platform {platform}")
        if notice := compat.unknown_version():
            print(f"note: {notice}")
    is_on = platform is not None and platform.startswith("vllm_afbs.")
    found = list(plugins.find_plugins(is_on))
    for plugin in found:
        print(plugin)
    if is_on:
        return True
    ours = (str(each) for each in found if (each.kind, each.name) == ("platform", plugins.NAME))
    print(f"off: {plugins.not_registered() or next(ours)}; {failure}")
    return False


def _check_layers(model: str | None, serve_arguments: Sequence[str]) -> int:
    """Prints what the layers of a server would serve; returns the exit status."""
    from vllm_afbs.check.layers import parse_serve_arguments, plan_server, server_config

    given = [*([model] if model is not None else []), *serve_arguments]
    if not serve_arguments:
        print("note: assumed --attention-backend afbs, which vllm serve has to be given")
        given += ["--attention-backend", "afbs"]
    with _collected_log() as lines:
        config = server_config(parse_serve_arguments(given))
        for line in lines:
            if line != compat.unknown_version():  # said already
                print(f"note: {line}")
        if not compat.chooses_afbs(config):
            print("off: these arguments do not choose our backend: add --attention-backend afbs")
            return EXIT_OFF
        answer = plan_server(config)
    notes = (f"note: {note}" for note in answer.notes)
    for line in [*notes, *_level(answer), *_layers_by_outcome(answer)]:
        print(line)
    print(f"{'on' if answer.summary.num_sparse else 'off'}: {answer.summary}")
    return EXIT_ON if answer.summary.num_sparse else EXIT_OFF


@contextmanager
def _collected_log() -> Iterator[list[str]]:
    """Collects what our part of a server logs, which vLLM's turned-down log would drop."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.afbs")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def _level(answer: "Answer") -> Iterator[str]:
    """The level that would be served, and those that may be chosen."""
    if answer.profile is not None:
        names = [level.name for level in answer.profile.levels]
        whole = (
            f"the profile has {', '.join(names)}" if len(names) > 1 else "the profile's only one"
        )
        yield f"level {answer.level}: {whole}"


def _layers_by_outcome(answer: "Answer") -> Iterator[str]:
    """One line for the sparse layers and one for each reason to be dense, with their indices."""
    outcomes: dict[str, list[int]] = {}
    strangers: dict[str, list[str]] = {}
    limit = answer.summary.limit
    for name, plan in answer.plans.items():
        reason = plan.dense_reason or (limit.reason if limit else None)
        outcome = "sparse" if reason is None else f"dense, {reason}"
        if plan.layer < 0:
            strangers.setdefault(outcome, []).append(name)
        else:
            outcomes.setdefault(outcome, []).append(plan.layer)
    for outcome, indices in outcomes.items():
        yield f"layers {shortened(sorted(indices))}: {outcome}"
    for outcome, names in strangers.items():
        yield f"layers {', '.join(names)}: {outcome}"


def _refuse(message: str) -> int:
    print(f"{_PROGRAM}: error: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
