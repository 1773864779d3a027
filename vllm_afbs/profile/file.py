"""Reads a profile from a file and refuses anything that is not a valid one."""

import json
import os
import stat
from typing import Any

from pydantic import ValidationError

from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.older import OLDER_VERSIONS, OlderProfile
from vllm_afbs.profile.schema import SCHEMA_VERSION, Profile

MAX_BYTES = 64 * 2**20
"""Largest file that is read. The profile of a 70B model has about 3 MB."""


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Reads and checks a profile.

    Raises:
        ProfileError: The file cannot be read, is not a regular file, is too large, or
            ``parse_profile`` refuses it. The message is one line and names the file and the field.
    """
    try:
        content = _read(path)
    except OSError as error:
        raise ProfileError(f"{path}: cannot read the profile: {error.strerror}") from None
    except ValueError as error:
        raise ProfileError(f"{path}: cannot read the profile: {error}") from None
    return parse_profile(content, str(path))


def _read(path: str | os.PathLike[str]) -> bytes:
    # Non-blocking, because opening a pipe would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("a regular file expected")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"at most {MAX_BYTES} bytes expected")
    return content


def parse_profile(content: bytes, source: str) -> Profile:
    """Checks a profile.

    Args:
        content: The file's bytes.
        source: The file's name, for messages.

    Raises:
        ProfileError: The content is not JSON in UTF-8, has another schema version, or has a wrong
            field.
    """
    try:
        text = content.decode()
        data = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise ProfileError(f"{source}: cannot read the profile: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{source}: not valid JSON: {error}") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in (*OLDER_VERSIONS, SCHEMA_VERSION):
        older = ", ".join(map(str, OLDER_VERSIONS))
        raise ProfileError(
            f"{source}: schema_version: {older} or {SCHEMA_VERSION} expected, got {version!r}"
        )
    try:
        # Strict: "1" is not a number, and true is not 1.
        if version == SCHEMA_VERSION:
            profile = Profile.model_validate_json(text, strict=True)
        else:
            profile = OlderProfile.model_validate_json(text, strict=True).upgraded()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        prefix = f"{field}: " if field else ""
        raise ProfileError(f"{source}: {prefix}{first['msg']}") from None
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        raise ProfileError(f"{source}: model.rope or tuner.settings: NaN or Infinity") from None
    return profile


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice in one object")
    return found
