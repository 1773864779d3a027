"""Which files hold a checkpoint's weights, and a digest that tells one set of weights from another.

The tuner keeps the digest in the profile; a server computes it of what it serves. Neither reads all
weights for it, which reach hundreds of gigabytes.
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PIECE_BYTES = 1 << 16
_PIECES = 64
"""Read of a file: its start (with the header), its end, and others evenly between them."""
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""vLLM takes the first of them that there is."""


def weight_names(directory: Path) -> list[str]:
    """Names of the files that transformers reads weights from; they need not be there yet.

    Args:
        directory: With the checkpoint's configuration, and its index if it has several files.

    Raises:
        ValueError: The index is damaged, or names files elsewhere; the message names it.
    """
    chosen = _read_object(directory / "config.json").get("transformers_weights")
    if chosen is None:
        has_index = (directory / INDEX_FILE).is_file() and not (directory / SINGLE_FILE).is_file()
        chosen = INDEX_FILE if has_index else SINGLE_FILE
    _check_name(chosen, "config.json: transformers_weights")
    if not chosen.endswith(".index.json"):
        return [chosen]
    files = _read_object(directory / chosen).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{chosen}: weight_map: an object of tensors and files expected")
    for tensor, name in files.items():
        _check_name(name, f"{chosen}: weight_map: {tensor}")
    return sorted(set(files.values()))


def weights_sha256(directory: Path) -> str | None:
    """Digest of a checkpoint's weight files: their names, sizes and pieces of their content.

    64 pieces of 64 KiB are read of each file, spread from its start to its end: weights that were
    trained further, or that an adapter was merged into, differ in some of them. The same weights
    in other files, or quantised, have another digest.

    Args:
        directory: The checkpoint.

    Returns:
        64 hexadecimal digits; None if the weights are not there or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for name in weight_names(directory):
            _add(digest, directory / name)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def served_weights_sha256(model: str, revision: str | None = None) -> str | None:
    """``weights_sha256`` of a model as vLLM names it, looked up on this machine alone.

    Args:
        model: A directory, or a hub id whose snapshot is in the cache.
        revision: Of a hub id; None for the main one.

    Returns:
        The digest; None if it is unknown.
    """
    try:
        if Path(model).is_dir():
            return weights_sha256(Path(model))
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except (OSError, ValueError):
        return None
    return weights_sha256(Path(config).parent) if isinstance(config, str) else None


def adapter_sha256(directory: Path) -> str | None:
    """Digest of a LoRA adapter's files: its configuration, and pieces of its weights.

    Weights are read as by ``weights_sha256``: whole up to 4 MiB, else in pieces.

    Args:
        directory: The adapter, in the format of PEFT.

    Returns:
        64 hexadecimal digits; None if there is no adapter or it cannot be read.
    """
    digest = hashlib.sha256()
    weights = [path for name in _ADAPTER_WEIGHTS if (path := directory / name).is_file()]
    if not weights:
        return None
    try:
        for path in (directory / "adapter_config.json", *weights):
            _add(digest, path)
    except OSError:
        return None
    return digest.hexdigest()


def _add(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}\n".encode())
    room = max(0, size - _PIECE_BYTES)
    with path.open("rb") as file:
        for start in sorted({room * piece // (_PIECES - 1) for piece in range(_PIECES)}):
            file.seek(start)
            digest.update(file.read(_PIECE_BYTES))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name}: a JSON object expected")
    return data


def _check_name(name: Any, where: str) -> None:
    """Refuses what is no name of a safetensors file, or its index, in the same directory."""
    is_plain = isinstance(name, str) and PurePosixPath(name).name == name and "\\" not in name
    if not is_plain or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(f"{where}: a safetensors file beside it expected, got {name!r}")
