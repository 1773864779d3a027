"""Where a model's files are: a directory, or the Hugging Face hub's cache, filled as needed.

Only what is read is asked for: small files of the top level, then the weight files that the index
names. Repositories hold the same weights in other formats, in folders and beside these.
"""

import glob
import json
from dataclasses import dataclass
from pathlib import Path

from vllm_afbs.errors import InputError, one_line
from vllm_afbs.profile.weights import weight_names

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
_FOLDERS = ["*/*"]
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model's files.

    Attributes:
        name: What the user called it: a directory or a hub id.
        directory: Holds its small files, and the weights where they were fetched.
        on_hub: Whether missing weights can be asked for.
    """

    name: str
    directory: Path
    on_hub: bool

    def weight_files(self) -> list[Path]:
        """The files of the weights, fetched first where they are not there yet.

        Raises:
            InputError: There are no safetensors weights, or some of them are missing.
        """
        try:
            names = weight_names(self.directory)
        except ValueError as error:
            raise InputError(f"{self.name}: {one_line(error)}") from None
        files = [self.directory / name for name in names]
        refusal = ""
        if self.on_hub and not all(file.is_file() for file in files):
            # A snapshot's directory is named by its commit: the branch may have moved on.
            refusal = _download(self.name, self.directory.name, [glob.escape(x) for x in names])
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(
                f"{self.name}: the weights' file {missing[0]} expected in {self.directory}, not "
                f"found ({len(missing)} of {len(files)} missing){refusal}"
            )
        return files


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Finds a model's directory, with its small files.

    Args:
        name: A checkpoint's directory, or its id on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; None for the main branch.

    Raises:
        InputError: There is no such model, or it is an adapter or in another format.
    """
    path = Path(name)
    if name.endswith(".gguf"):
        raise InputError(f"{name}: GGUF files are not read: {_GIVE_ORIGINAL}")
    if _is_directory(path):
        if revision is not None:
            raise InputError(f"--revision: a model on the hub expected, {name} is a directory")
        checkpoint = Checkpoint(name, path, on_hub=False)
    elif name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such directory")
    else:
        checkpoint = Checkpoint(name, _snapshot(name, revision), on_hub=True)
    _check_format(checkpoint)
    return checkpoint


_GIVE_ORIGINAL = (
    "give the Hugging Face checkpoint that it was made from (safetensors), whose profile serves "
    "this one too"
)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _check_format(checkpoint: Checkpoint) -> None:
    name, directory = checkpoint.name, checkpoint.directory
    if (directory / _ADAPTER).is_file():
        base = _base_model(directory / _ADAPTER)
        raise InputError(
            f"{name}: an adapter ({_ADAPTER}), not a model: tune the model that it is for{base}"
        )
    if not (directory / "config.json").is_file():
        if any(directory.glob("*.gguf")) or "gguf" in name.lower():
            raise InputError(f"{name}: GGUF files are not read: {_GIVE_ORIGINAL}")
        raise InputError(f"{name}: config.json expected in the model's directory, not found")


def _base_model(path: Path) -> str:
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f", {base!r}" if isinstance(base, str) and len(base) < 200 else ""


def _snapshot(name: str, revision: str | None) -> Path:
    """The directory of a hub model's snapshot, with its small files where the hub gives them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=_FOLDERS
            )
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        # Another tool may have left out files that we would ask for, and do not need.
        if cached := _cached(name, revision):
            return cached
        of = f" (revision {revision})" if revision else ""
        raise InputError(
            f"{name}{of}: neither a directory nor a model the Hugging Face hub gives: "
            f"{one_line(error)}"
        ) from None


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", _ADAPTER):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except (OSError, ValueError):
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _download(name: str, commit: str, patterns: list[str]) -> str:
    """Fetches files of a snapshot into the cache; says why it could not, or nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=_FOLDERS)
    except (OSError, ValueError, HfHubHTTPError) as error:
        return f"; the hub does not give them: {one_line(error)}"
    return ""
