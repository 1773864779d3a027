"""Opening a Hugging Face decoder; what cannot be tuned is refused before any weights are read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_afbs.profile.errors import ProfileError
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.tuning.errors import InputError, one_line

__all__ = ["InputError", "SourceModel", "one_line", "open_model"]

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
WEIGHT_FILES = "*.safetensors"
_DIGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceModel:
    """A supported model whose weights have not been read yet.

    Attributes:
        name: The directory or hub id that the user gave.
        config: Its ``PretrainedConfig``.
        fingerprint: What a served model has to match.
        max_length: Longest context that its positions allow, in tokens.
    """

    name: str
    config: Any
    fingerprint: ModelFingerprint
    max_length: int

    def directory(self) -> Path:
        """The directory with the weights, fetched first if ``name`` is a hub id.

        Raises:
            InputError: There are no safetensors weights.
        """
        directory = _resolve(self.name, [*SMALL_FILES, WEIGHT_FILES])
        if not any(directory.glob(WEIGHT_FILES)):
            raise InputError(f"{self.name}: no {WEIGHT_FILES} weights found in {directory}")
        return directory

    def digest(self) -> str:
        """Hash of the configuration and of every weight file's size, first and last MiB.

        Whole checkpoints are not hashed: they reach hundreds of gigabytes, and retraining changes
        the ends of a file as well.
        """
        digest = hashlib.sha256(self.fingerprint.model_dump_json().encode())
        for path in sorted(self.directory().glob(WEIGHT_FILES)):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(_DIGEST_BYTES))
                file.seek(max(0, size - _DIGEST_BYTES))
                digest.update(file.read(_DIGEST_BYTES))
        return digest.hexdigest()


def open_model(name: str) -> SourceModel:
    """Reads a model's configuration and checks that it can be tuned.

    Args:
        name: A checkpoint's directory, or its id on the Hugging Face hub.

    Raises:
        InputError: Missing, unreadable, or a kind of attention that is not supported.
    """
    from transformers import AutoConfig

    directory = _resolve(name, SMALL_FILES)
    if not (directory / "config.json").is_file():
        raise InputError(f"{name}: config.json expected in the model's directory, not found")
    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: cannot read config.json: {one_line(error)}") from None
    if reason := _unsupported(config):
        raise InputError(f"{name}: config.json: {reason}")
    try:
        fingerprint = ModelFingerprint.from_config(config)
    except ProfileError as error:
        raise InputError(f"{name}: {error}") from None
    max_length = int(config.get_text_config().max_position_embeddings)
    return SourceModel(name, config, fingerprint, max_length)


def _resolve(name: str, patterns: list[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise InputError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError, HfHubHTTPError) as error:
        raise InputError(
            f"{name}: neither a directory nor a model the Hugging Face hub gives: {one_line(error)}"
        ) from None


def _unsupported(config: Any) -> str | None:
    """Why a model cannot be tuned, or None."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING,
    )

    architecture = (config.architectures or ["none"])[0]
    if config.is_encoder_decoder or architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return f"architectures: a decoder-only causal language model expected, got {architecture}"
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        return "kv_lora_rank: latent attention (MLA) is not supported"
    position_type = getattr(text, "position_embedding_type", None)
    if getattr(text, "alibi", False) or position_type == "alibi":
        return "alibi: linear position biases (ALiBi) are not supported"
    if text.model_type in ("bloom", "mpt"):
        return f"model_type: {text.model_type} has position biases (ALiBi), not supported"
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layer_types: full_attention expected in every layer, got {sorted(kinds)}"
    if getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None):
        return f"sliding_window: null expected, got {text.sliding_window}"
    if getattr(text, "attn_logit_softcapping", None):
        return "attn_logit_softcapping: null expected: capped scores are not supported"
    if not getattr(MODEL_MAPPING[type(config)], "_supports_attention_backend", False):
        return f"model_type: {text.model_type} in transformers takes no custom attention function"
    return None
