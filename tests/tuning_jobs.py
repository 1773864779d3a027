"""Jobs of the tuner's command line on a tiny model, for tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_afbs.profile.schema import Profile

LENGTHS = ["128", "256"]
BLOCKS = ["--block-q", "16", "--block-k", "16"]


def save_tiny_model(directory: Path, hidden_size: int = 64, **fields: int) -> None:
    """A random two-layer Llama with a byte tokenizer, both made here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        **({"max_position_embeddings": 1024} | fields),
        # Large weights, or random attention is uniform and nothing can be dropped.
        initializer_range=0.4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    save_byte_tokenizer(directory)


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer of 256 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


IN_PROCESS = ["--engine", "transformers"]
"""Most tests are about the search, for which vLLM need not start."""


def where(model: Path, output: Path) -> list[str]:
    return ["--model", str(model), "--output", str(output), *IN_PROCESS]


def command(model: Path, output: Path, *more: str) -> list[str]:
    return [*where(model, output), "--lengths", *LENGTHS, *BLOCKS, *more]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vllm_afbs.tune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests fill the disk under a job; it must not leave bytecode cut short (full_disk.py).
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        # A shell's background job ignores SIGINT, and so would a child of tests run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_steps(job: subprocess.Popen[str], output: Path, count: int) -> None:
    """Waits until the journal of a running job holds so many lines."""
    wait_for(job, output, lambda journal: journal.count(b"\n") >= count)


def wait_for(job: subprocess.Popen[str], output: Path, reached: Callable[[bytes], bool]) -> None:
    """Waits until a running job's journal is as wanted."""
    journal = Path(f"{output}.work") / "journal.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if journal.exists() and reached(journal.read_bytes()):
            return
        assert job.poll() is None, job.communicate()
        time.sleep(0.02)
    pytest.fail("the job did not come so far within 300 s")


def result(profile: Profile) -> dict[str, object]:
    """A profile less its times."""
    times = {"created_at", "wall_seconds"}
    return profile.model_dump(exclude={"tuner": times})
