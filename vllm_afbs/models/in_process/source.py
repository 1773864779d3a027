"""Opening a Hugging Face decoder; what cannot be tuned is refused before any weights are read."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_afbs.errors import InputError
from vllm_afbs.models.hub import Checkpoint, find_checkpoint
from vllm_afbs.models.in_process import quantised
from vllm_afbs.models.in_process.configuration import positions, read_config
from vllm_afbs.models.in_process.supported import least_longest_length, unsupported, widen_windows
from vllm_afbs.models.tokenizer import load_tokenizer
from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.layers import full_layers, tunable_layers
from vllm_afbs.profile.weights import weights_sha256


@dataclass(frozen=True)
class SourceModel:
    """A supported model whose weights have not been read yet.

    Attributes:
        name: The directory or hub id that the user gave.
        config: Its ``PretrainedConfig``.
        fingerprint: What a served model has to match.
        max_length: Longest context that its positions allow, in tokens.
        checkpoint: Its files.
    """

    name: str
    config: Any
    fingerprint: ModelFingerprint
    max_length: int
    checkpoint: Checkpoint

    def directory(self) -> Path:
        """The directory with the configuration and the tokenizer."""
        return self.checkpoint.directory

    def weight_files(self) -> list[Path]:
        """The files of the weights, fetched first if ``name`` is a hub id.

        Raises:
            InputError: There are no safetensors weights.
        """
        return self.checkpoint.weight_files()

    def weights_sha256(self) -> str | None:
        """Digest of the weights, which are fetched first; see ``profile.weights``."""
        self.weight_files()
        return weights_sha256(self.directory())

    def eos_token_id(self) -> Any:
        """Token ids that end an answer, by the configuration."""
        return self.config.get_text_config().eos_token_id

    @property
    def full_layers(self) -> list[int]:
        """Indices of the layers with full attention."""
        return full_layers(self.config.get_text_config())

    @property
    def tunable_layers(self) -> list[int]:
        """Indices of those that also have keys and values of their own."""
        return tunable_layers(self.config.get_text_config())

    @property
    def least_longest_length(self) -> int:
        """Tokens that the longest calibrated length must have at least."""
        return least_longest_length(self.config)

    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            InputError: It cannot be read.
        """
        return load_tokenizer(self.name, self.directory())

    def digest(self) -> str:
        """Hash of the whole configuration and of the weights' digest."""
        parts = [self.config.to_json_string(use_diff=False), self.weights_sha256()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def open_model(
    name: str, revision: str | None = None, overrides: Mapping[str, Any] | None = None
) -> SourceModel:
    """Reads a model's configuration and checks that it can be tuned.

    Args:
        name: A checkpoint's directory, or its id on the Hugging Face hub.
        revision: Branch, tag or commit on the hub; None for the main branch.
        overrides: Fields of its configuration to set, as ``vllm serve --hf-overrides`` does.

    Raises:
        InputError: Missing, unreadable, or a kind of attention that is not supported.
    """
    checkpoint = find_checkpoint(name, revision)
    try:
        config = read_config(checkpoint.directory, overrides or {})
        text = config.get_text_config()
        max_length = positions(text)
        widen_windows(text, max_length)
        if reason := unsupported(config):
            raise InputError(f"config.json: {reason}")
        fingerprint = ModelFingerprint.from_config(config)
        quantised.prepare(config, checkpoint.directory)
    except (InputError, ProfileError) as error:
        raise InputError(f"{name}: {error}") from None
    return SourceModel(name, config, fingerprint, max_length, checkpoint)
