"""A model's tokenizer."""

from pathlib import Path
from typing import Any

from vllm_afbs.errors import InputError, one_line


def load_tokenizer(name: str, directory: Path) -> Any:
    """Loads a tokenizer.

    Args:
        name: What the user called the model, for the message.
        directory: Holds the tokenizer's files.

    Raises:
        InputError: It cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # damaged files raise errors of many unrelated kinds
        raise InputError(f"{name}: cannot read the tokenizer: {one_line(error)}") from None
