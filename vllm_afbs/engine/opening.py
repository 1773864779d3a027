"""Opens a model with what runs it: vLLM in a process of its own, or transformers in this one.

Little is imported here before vLLM's process runs, because that takes longest to start.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_afbs.commands.arguments import VLLM
from vllm_afbs.engine.process import EngineProcess, new_log

if TYPE_CHECKING:
    from vllm_afbs.tuning.engine import Engine, Model


@contextmanager
def opened(
    options: argparse.Namespace,
    serve: Sequence[str],
    block_k: Callable[[], int],
    with_adapters: bool = False,
) -> "Iterator[tuple[Model, Engine]]":
    """Opens the model of a command line.

    Args:
        options: The command's, of ``commands.arguments.parse_with_engine``.
        serve: The arguments for vLLM.
        block_k: Says how many keys the key blocks have that it will serve, when vLLM has begun to
            start.
        with_adapters: Whether its LoRA adapters are used.

    Raises:
        InputError: The model cannot be run.
        OSError: vLLM's log cannot be written.
    """
    if options.engine == VLLM:
        process = EngineProcess(new_log())
        try:
            from vllm_afbs.engine.client import VllmEngine

            vllm = VllmEngine(serve, block_k(), with_adapters, process)
        except BaseException:
            process.end()
            raise
        with vllm as engine:
            yield engine, engine
        return
    from vllm_afbs.models.in_process.engine import TransformersEngine
    from vllm_afbs.models.in_process.source import open_model

    model = open_model(options.model, options.revision, options.hf_overrides)
    yield model, TransformersEngine(model)


def say_engine(engine: "Engine") -> None:
    """Says on standard error what is about to run the model."""
    print(f"running the model in {engine.tuned_on().engine}", file=sys.stderr, flush=True)
