"""What a tuning job needs of a model: to be described, and to be run.

Nothing here runs a model. vLLM does in its own workers (``vllm_afbs.engine``), or transformers in
this process (``vllm_afbs.models.in_process``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vllm_afbs.captures import Capture
from vllm_afbs.kernels import HeadThresholds
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.tuner_run import TunedOn


class Model(Protocol):
    """A model that is described, but perhaps not loaded.

    Attributes:
        name: The directory or hub id that the user gave.
        fingerprint: What a served model has to match.
        max_length: Longest context that its positions allow, in tokens.
        full_layers: Indices of the layers with full attention.
        tunable_layers: Indices of those that also have keys and values of their own.
        least_longest_length: Tokens that the longest calibrated length must have at least.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> ModelFingerprint: ...  # noqa: D102
    @property
    def max_length(self) -> int: ...  # noqa: D102
    @property
    def full_layers(self) -> list[int]: ...  # noqa: D102
    @property
    def tunable_layers(self) -> list[int]: ...  # noqa: D102
    @property
    def least_longest_length(self) -> int: ...  # noqa: D102

    def directory(self) -> Path:
        """The directory with the configuration and the tokenizer."""

    def eos_token_id(self) -> Any:
        """Token ids that end an answer, by the configuration: one, a list or none."""

    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""

    def digest(self) -> str:
        """Hash of everything that its captured tensors depend on, apart from the tokens."""

    def weights_sha256(self) -> str | None:
        """Digest of its weight files, see ``profile.weights``; None if they are unknown."""


@dataclass(frozen=True)
class Compared:
    """Predictions with sparse layers beside dense ones, over one window.

    Attributes:
        dense_loss: Mean negative log likelihood of the tokens that follow, in nats, dense.
        loss: The same with sparse layers.
        kl: Mean KL divergence of the sparse predictions from the dense ones, in nats.
    """

    dense_loss: float
    loss: float
    kl: float


COMPARED_POSITIONS = 1024
"""How many positions of a window are compared, spread evenly over it."""


def compared_positions(num_tokens: int) -> range:
    """The positions of a window whose predictions ``SparseModel.compare`` compares."""
    step = max(1, num_tokens // COMPARED_POSITIONS)
    return range(step - 1, num_tokens - 1, step)


class SparseModel(Protocol):
    """A loaded model whose layers can be made sparse."""

    def compare(self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]) -> Compared:
        """Predicts a window's tokens dense and sparse; the dense predictions are made once.

        Args:
            tokens: Token ids of the window.
            thresholds: Thresholds of the layers that run sparse, by the layer's index.
        """

    def losses(
        self, tokens: Sequence[int], thresholds: Mapping[int, HeadThresholds]
    ) -> torch.Tensor:
        """Loss of every token after a window's first, ``[length - 1]``; no thresholds is dense."""


class Adapter(Protocol):
    """A LoRA adapter that an engine can run its model with.

    Attributes:
        name: What the user calls it.
        sha256: Digest of its files, see ``profile.weights``.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def sha256(self) -> str: ...  # noqa: D102

    def sparse_model(self, block_q: int, block_k: int) -> SparseModel:
        """The loaded model with this adapter; see ``Engine.sparse_model``."""


class Engine(Protocol):
    """Runs a model.

    Attributes:
        adapters: LoRA adapters for which levels are to be validated.
    """

    @property
    def adapters(self) -> Sequence[Adapter]: ...  # noqa: D102

    def tuned_on(self) -> TunedOn:
        """What ran the model, for the profile."""

    def capture(
        self,
        windows: Mapping[str, list[int]],
        taken: Capture,
        on_progress: Callable[[float], None],
    ) -> None:
        """Runs the model over windows and writes the layers' Q, K and V.

        Args:
            windows: Token ids of the windows to run, by name.
            taken: Where the tensors go, and of which layers.
            on_progress: Called with 1 after each layer of ``taken`` in each window.

        Raises:
            InputError: The weights cannot be read, or a layer's attention is not supported.
            OSError: The disk is full.
        """

    def sparse_model(self, block_q: int, block_k: int) -> SparseModel:
        """The loaded model, for goals that are set for all of it.

        Args:
            block_q: Rows of a query block.
            block_k: Keys of a key block.
        """

    def make_room(self) -> None:
        """Frees what the loaded model takes, if the search could lack it.

        It is loaded again when it is needed again.
        """
