"""The tuner's command line: ``python -m vllm_afbs.tune --model MODEL --output profile.json``.

Torch and Ax are imported only after the arguments have been checked, so that ``--help`` and the
message about a mistyped option appear at once.
"""

import argparse
import importlib
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_afbs.commands.arguments import parse_with_engine, unusable_output
from vllm_afbs.commands.extras import missing_extra
from vllm_afbs.commands.faults import guarded
from vllm_afbs.commands.tuning_options import CPU_LONGEST, LENGTHS, tuning_parser

if TYPE_CHECKING:
    from vllm_afbs.profile.schema import Profile
    from vllm_afbs.tuning.allocation.goal import Goal
    from vllm_afbs.tuning.engine import Model
    from vllm_afbs.tuning.search.scorer import SearchSettings
    from vllm_afbs.tuning.workers import LayerPool

_PROGRAM = "vllm-afbs-tune"
EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: the profile is written. 2: an argument cannot be used; one line says which. 1: a file cannot
    be written, for instance because the disk is full. 130: interrupted; ``--resume`` continues.
    70: a fault of ours; the traceback is kept in a file.
    """
    options, serve = parse_with_engine(tuning_parser(_PROGRAM), arguments)
    try:
        return guarded(_PROGRAM, lambda: _run(options, serve))
    except KeyboardInterrupt:
        print(
            f"\nInterrupted. Continue with: {_command(arguments)} --resume",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED


def _run(options: argparse.Namespace, serve: Sequence[str]) -> int:
    if reason := missing_extra("tune") or _unusable_output(options.output):
        return _refuse(reason)
    work = Path(f"{options.output}.work")
    if work.exists() and not options.resume:
        return _refuse(
            f"{work}: left by a job that was stopped: pass --resume to continue it, or remove the "
            "directory to start again"
        )
    from vllm_afbs.errors import InputError, one_line
    from vllm_afbs.tuning import memory

    try:
        with memory.explained(
            "tuning",
            "shorter --lengths or fewer --workers expected, or a machine with more memory",
        ):
            profile = _profile(options, serve, work)
    except InputError as error:
        return _refuse(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        kept = f"; {work} keeps what is done, and --resume goes on with it" if work.exists() else ""
        return _refuse(f"{where}{error.strerror or one_line(error)}{kept}", EXIT_FAILED)
    shutil.rmtree(work)
    from vllm_afbs.tuning.console import print_summary

    print_summary(profile, options.output, _report_file(options.output))
    return 0


def _profile(options: argparse.Namespace, serve: Sequence[str], work: Path) -> "Profile":
    """Does the whole job; returns what was written."""
    # Torch takes seconds to import, and so does vLLM, in its own process.
    threading.Thread(target=importlib.import_module, args=["vllm_afbs.tuning.run"]).start()
    from vllm_afbs.engine.opening import opened, say_engine

    with opened(options, serve, lambda: _block_k(options), with_adapters=True) as (model, engine):
        from vllm_afbs.cost_models import cost_model
        from vllm_afbs.errors import InputError
        from vllm_afbs.files import write_atomically
        from vllm_afbs.tuning.console import ProgressBar
        from vllm_afbs.tuning.journal import FILE_NAME, read_entries
        from vllm_afbs.tuning.report import write_report
        from vllm_afbs.tuning.run import tune
        from vllm_afbs.tuning.texts import read_texts

        if engine.adapters and options.search == "one-tolerance":
            raise InputError(
                "--lora-modules: --search analytic or ax expected with adapters, which levels are "
                "validated with; one-tolerance runs no sparse model"
            )
        texts = read_texts(options.calibration, options.calibration_column, model.tokenizer)
        for text in texts:
            if text.coverage:
                print(f"{text.name}: {text.coverage}", file=sys.stderr)
        settings = _settings(options, model)
        layers = _layers(options.layers, model.fingerprint.num_layers, model.tunable_layers)
        goal = _goal(options)
        say_engine(engine)
        with _layer_pool(options) as pool, ProgressBar() as progress:
            profile = tune(
                model, engine, texts, settings, layers, goal, options.search,
                cost_model(settings.block_q, settings.block_k), work, progress, pool,
            )  # fmt: skip
    write_report(profile, read_entries(work / FILE_NAME), _report_file(options.output))
    write_atomically(options.output, profile.to_json())
    return profile


def _block_k(options: argparse.Namespace) -> int:
    from vllm_afbs.tuning.device import default_block_k

    return options.block_k or default_block_k()


def _goal(options: argparse.Namespace) -> "Goal | None":
    from vllm_afbs.errors import InputError
    from vllm_afbs.tuning.allocation.goal import OPTIONS, Goal

    given = {
        "sparsity": options.target_sparsity,
        "speedup": options.target_speedup,
        "perplexity": options.max_perplexity_increase,
        "kl": options.max_kl,
    }
    goals = [Goal(kind, given[kind]) for kind in OPTIONS if given[kind] is not None]
    if not goals:
        return None
    option = OPTIONS[goals[0].kind]
    if options.layers is not None:
        raise InputError(f"--layers: all layers expected with {option}")
    if options.search == "one-tolerance":
        raise InputError(f"--search: analytic or ax expected with {option}, got {options.search}")
    return goals[0]


def _layer_pool(options: argparse.Namespace) -> "AbstractContextManager[LayerPool | None]":
    if options.workers is None and options.ray_address is None:
        return nullcontext()
    from vllm_afbs.tuning.workers import LayerPool

    return LayerPool(options.workers, options.ray_address)


def _settings(options: argparse.Namespace, model: "Model") -> "SearchSettings":
    from vllm_afbs.errors import InputError
    from vllm_afbs.tuning.device import compute_device
    from vllm_afbs.tuning.search.scorer import SearchSettings

    reach = model.max_length
    has_gpu = compute_device().type == "cuda"
    lengths = sorted(set(options.lengths or default_lengths(reach, has_gpu)))
    if lengths and lengths[-1] > reach:
        raise InputError(
            f"--lengths: at most {reach} (max_position_embeddings, or --max-model-len), got "
            f"{lengths[-1]}"
        )
    least = model.least_longest_length
    if lengths and lengths[-1] < least:
        raise InputError(
            f"--lengths: a longest length of {least} or more expected, since this model's longer "
            f"contexts have other positions (longrope), got {lengths[-1]}"
        )
    if len(lengths) < 2:
        raise InputError(
            f"--lengths: at least two different lengths up to {reach} expected, got {lengths}"
        )
    return SearchSettings(
        lengths, options.tolerance, options.block_q, _block_k(options), options.seed
    )


def default_lengths(reach: int, has_gpu: bool) -> list[int]:
    """Chooses context lengths if the user gives none.

    Args:
        reach: Longest context of the model, in tokens.
        has_gpu: Whether the job runs on a GPU.
    """
    longest = reach if has_gpu else min(reach, CPU_LONGEST)
    return [length for length in LENGTHS if length <= longest][-3:]


def _layers(ranges: Sequence[range] | None, num_layers: int, tunable: list[int]) -> list[int]:
    from vllm_afbs.commands.ranges import shortened
    from vllm_afbs.errors import InputError

    if not tunable:
        raise InputError("--model: a model with full attention in some layer expected")
    if ranges is None:
        return tunable
    if (last := max(each[-1] for each in ranges)) >= num_layers:
        raise InputError(f"--layers: layers from 0 to {num_layers - 1} expected, got {last}")
    layers = sorted({layer for each in ranges for layer in each})
    if others := sorted(set(layers) - set(tunable)):
        raise InputError(
            f"--layers: layers with full attention to keys of their own expected "
            f"({shortened(tunable)}), got {shortened(others)}"
        )
    return layers


def _report_file(output: Path) -> Path:
    return output.with_suffix(".html")


def _unusable_output(output: Path) -> str | None:
    if reason := unusable_output(output):
        return reason
    if output == _report_file(output):
        return f"{output}: a name ending in .json expected: .html is the report's ending"
    return None


def _refuse(message: str, status: int = EXIT_BAD_INPUT) -> int:
    print(f"{_PROGRAM}: error: {message}", file=sys.stderr)
    return status


def _command(arguments: list[str] | None) -> str:
    given = sys.argv[1:] if arguments is None else arguments
    return shlex.join([_PROGRAM, *(item for item in given if item != "--resume")])


if __name__ == "__main__":
    sys.exit(main())
