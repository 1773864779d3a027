"""Opens a model with what runs it: vLLM in a process of its own, or transformers in this one."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_afbs.commands.arguments import VLLM
from vllm_afbs.engine.client import VllmEngine
from vllm_afbs.models.in_process.engine import TransformersEngine
from vllm_afbs.models.in_process.source import open_model
from vllm_afbs.tuning.engine import Engine, Model


@contextmanager
def opened(
    options: argparse.Namespace,
    serve: Sequence[str],
    block_k: int,
    with_adapters: bool = False,
) -> Iterator[tuple[Model, Engine]]:
    """Opens the model of a command line.

    Args:
        options: The command's, of ``commands.arguments.parse_with_engine``.
        serve: The arguments for vLLM.
        block_k: Keys of the key blocks that it will serve.
        with_adapters: Whether its LoRA adapters are used.

    Raises:
        InputError: The model cannot be run.
    """
    if options.engine == VLLM:
        with VllmEngine(serve, block_k, with_adapters) as engine:
            yield engine, engine
        return
    model = open_model(options.model, options.revision, options.hf_overrides)
    yield model, TransformersEngine(model)


def say_engine(engine: Engine) -> None:
    """Says on standard error what is about to run the model."""
    print(f"running the model in {engine.tuned_on().engine}", file=sys.stderr, flush=True)
