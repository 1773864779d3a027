"""The evaluation's command line.

    python -m vllm_afbs.evaluate --model MODEL --profile profile.json --output quality.json

Torch is imported only once the arguments are known to be usable.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_afbs.commands.arguments import parse_with_engine, unusable_output
from vllm_afbs.commands.extras import missing_extra
from vllm_afbs.commands.faults import guarded
from vllm_afbs.evaluate.options import evaluation_parser

if TYPE_CHECKING:
    from vllm_afbs.evaluate.predictor import Predictor
    from vllm_afbs.evaluate.server import Served
    from vllm_afbs.evaluate.suite import Amounts
    from vllm_afbs.profile.schema import Profile
    from vllm_afbs.tuning.engine import Engine, Model
    from vllm_afbs.tuning.texts import Text

PROGRAM = "python -m vllm_afbs.evaluate"
EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation; returns the exit status.

    0: the report is written. 2: an argument cannot be used; one line says which. 1: a file cannot
    be written, for instance because the disk is full. 70: a fault of ours. 130: interrupted.
    """
    options, serve = parse_with_engine(evaluation_parser(PROGRAM), argv)
    try:
        return guarded(PROGRAM, lambda: _checked(options, serve))
    except KeyboardInterrupt:
        return _refuse("interrupted, nothing is written", EXIT_INTERRUPTED)


def _checked(options: argparse.Namespace, serve: Sequence[str]) -> int:
    if reason := missing_extra("evaluate") or _unusable_output(options.output):
        return _refuse(reason)
    from vllm_afbs.errors import InputError, one_line
    from vllm_afbs.profile.errors import ProfileError
    from vllm_afbs.tuning import memory

    try:
        with memory.explained(
            "evaluating", "a shorter --length expected, or a machine with more memory"
        ):
            return _run(options, serve)
    except (InputError, ProfileError) as error:
        return _refuse(str(error))
    except OSError as error:
        where = error.filename or options.output
        return _refuse(f"{where}: {error.strerror or one_line(error)}", EXIT_FAILED)


def _run(options: argparse.Namespace, serve: Sequence[str]) -> int:
    from vllm_afbs.engine.opening import opened
    from vllm_afbs.profile.file import load_profile

    profile = load_profile(options.profile)
    with opened(options, serve, lambda: profile.block_k) as (model, engine):
        return _evaluate(options, profile, model, engine)


def _evaluate(
    options: argparse.Namespace, profile: "Profile", model: "Model", engine: "Engine"
) -> int:
    profile.check_model(model.fingerprint, str(options.profile))
    # Servers come first: one that cannot be used is refused before anything is read or run.
    servers = _servers(options, profile, model)
    level = _level(options, profile, servers.get("--server"))
    amounts = _amounts(options, profile, model, servers)
    text = _text(options, profile, model)
    if text.coverage:
        print(f"{text.name}: {text.coverage}", file=sys.stderr)
    from vllm_afbs.engine.opening import say_engine
    from vllm_afbs.evaluate.comparison import compare
    from vllm_afbs.evaluate.report import show, write_report
    from vllm_afbs.evaluate.suite import ask, make_suite

    suite = make_suite(model.tokenizer(), text, amounts)
    dense, sparse = _predictors(servers, profile.with_default(level), model, engine)
    if len(servers) < 2:
        say_engine(engine)
    start = time.monotonic()
    print("asking the dense model", file=sys.stderr, flush=True)
    reference = ask(dense, suite)
    print("asking the sparse model", file=sys.stderr, flush=True)
    answers = ask(sparse, suite)
    comparisons = compare(suite, reference, answers)
    show(comparisons, answers.sparsity)
    about = {
        "model": model.name,
        "rope": model.fingerprint.rope,
        "profile": str(options.profile),
        "profile_id": profile.profile_id,
        "level": level,
        "text": {"name": text.name, "sha256": text.sha256, "coverage": text.coverage},
        "through": options.server or engine.tuned_on().engine,
        "dense_through": options.dense_server or engine.tuned_on().engine,
        "length": amounts.length,
        "seed": amounts.seed,
        "sparsity": answers.sparsity,
        "seconds": round(time.monotonic() - start, 1),
    }
    shape = f"{Path(model.name).name}-L{amounts.length}-sparsity{answers.sparsity:.2f}"
    if (rope := model.fingerprint.rope.get("rope_type", "default")) != "default":
        shape += f"-{rope} positions"
    write_report(options.output, comparisons, about, shape)
    return 0


def _unusable_output(output: Path) -> str | None:
    if output.suffix in (".csv", ".svg"):
        return f"{output}: a name ending in .json expected for --output"
    return unusable_output(output)


def _amounts(
    options: argparse.Namespace,
    profile: "Profile",
    model: "Model",
    servers: "Mapping[str, Served]",
) -> "Amounts":
    from vllm_afbs.errors import InputError
    from vllm_afbs.evaluate.suite import Amounts

    limits = [
        (profile.max_seq_len, "the profile's longest context"),
        (model.max_length, "the model's positions"),
    ]
    # A server generates a token even where only the losses of the prompt are asked for.
    generated = 1 if "perplexity" in options.tests else 0
    for option, server in servers.items():
        if (most := server.max_model_len) is not None:
            limits.append((most - generated, f"{option}: max_model_len {most} of that server"))
    shortest, (reach, limit) = profile.min_seq_len, min(limits)
    if reach < shortest:
        raise InputError(
            f"{limit}: at least {shortest + generated} expected, or all prompts would run dense"
        )
    length = options.length or reach
    if not shortest <= length <= reach:
        raise InputError(f"--length: {shortest} to {reach} expected ({limit}), got {length}")

    def if_asked(test: str, amount: int) -> int:
        return amount if test in options.tests else 0

    return Amounts(
        length=length,
        windows=if_asked("perplexity", options.windows),
        prefixes=if_asked("prefixes", options.prefixes),
        continuations=if_asked("agreement", options.continuations),
        new_tokens=options.new_tokens,
        per_kind=if_asked("retrieval", options.per_task),
        seed=options.seed,
        shortest=profile.min_seq_len,
    )


def _text(options: argparse.Namespace, profile: "Profile", model: "Model") -> "Text":
    """Reads the text to evaluate on; the profile must not have been tuned on it."""
    from vllm_afbs.errors import InputError
    from vllm_afbs.tuning.texts import Text, read_texts

    if options.text is not None:
        (text,) = read_texts([options.text], options.text_column, model.tokenizer)
        if text.sha256 in {source.sha256 for source in profile.calibration_texts}:
            raise InputError(
                f"{options.text}: a held-out text expected: the profile was tuned on this one"
            )
        return text
    from vllm_afbs.commands.python_reference import python_reference

    # The tuner's default is the whole reference.
    if any(source.name.startswith("pydoc_data.topics") for source in profile.calibration_texts):
        raise InputError("--text: a text expected: the profile was tuned on the default one")
    return Text("Python's language reference, held-out part", python_reference().held_out)


def _servers(
    options: argparse.Namespace, profile: "Profile", model: "Model"
) -> "dict[str, Served]":
    """The running servers, by the option that names them."""
    from vllm_afbs.evaluate.predictor import end_tokens
    from vllm_afbs.evaluate.server import Served

    named = {
        "--server": (options.server, profile.profile_id),
        "--dense-server": (options.dense_server, None),
    }
    return {
        option: Served(url, end_tokens(model), profile_id)
        for option, (url, profile_id) in named.items()
        if url
    }


def _level(options: argparse.Namespace, profile: "Profile", server: "Served | None") -> str:
    """Name of the level that is evaluated."""
    from vllm_afbs.errors import InputError
    from vllm_afbs.profile.errors import ProfileError

    wanted: str = options.level or profile.default_level
    try:
        profile.level_index(wanted)
    except ProfileError as error:
        raise InputError(f"--{error}") from None
    if server is None:
        return wanted
    served = server.level or profile.default_level
    if options.level not in (None, served):
        raise InputError(
            f"--level: {served} expected, which {options.server} serves now, or POST {wanted} to "
            "its /afbs/level first"
        )
    return served


def _predictors(
    servers: "Mapping[str, Served]", profile: "Profile", model: "Model", engine: "Engine"
) -> "tuple[Predictor, Predictor]":
    """Makes the dense and the sparse predictor; loads weights only if one of them runs here."""
    from vllm_afbs.engine.client import VllmEngine
    from vllm_afbs.evaluate.baselines import of_profile
    from vllm_afbs.evaluate.engine import InEngine
    from vllm_afbs.evaluate.in_process import InProcess, Runner
    from vllm_afbs.evaluate.methods import Selection
    from vllm_afbs.evaluate.predictor import end_tokens
    from vllm_afbs.models.in_process.source import SourceModel

    sparse: Predictor | None = servers.get("--server")
    dense: Predictor | None = servers.get("--dense-server")
    if sparse is not None and dense is not None:
        return dense, sparse
    if isinstance(engine, VllmEngine):
        ends = end_tokens(model)
        return dense or InEngine(engine, None, ends), sparse or InEngine(engine, profile, ends)
    assert isinstance(model, SourceModel)
    runner = Runner(model)
    selection = Selection(of_profile("afbs", profile), 0.0)
    return dense or InProcess(runner, None), sparse or InProcess(runner, selection)


def _refuse(message: str, status: int = EXIT_BAD_INPUT) -> int:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
