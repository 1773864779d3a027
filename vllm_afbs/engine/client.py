"""A model that vLLM runs: the tuner's ``Model`` and ``Engine``."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vllm_afbs.captures import Capture, HeadCounts
from vllm_afbs.engine.description import Description
from vllm_afbs.engine.layers import RunsDenseError, Workers
from vllm_afbs.engine.process import EngineProcess, new_log
from vllm_afbs.engine.room import memory_share, stays_loaded
from vllm_afbs.engine.sparse_model import EngineAdapter, EngineSparseModel
from vllm_afbs.errors import InputError
from vllm_afbs.models.hub import Checkpoint, find_checkpoint
from vllm_afbs.models.tokenizer import load_tokenizer
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import Profile
from vllm_afbs.profile.tuner_run import TunedOn
from vllm_afbs.profile.weights import weights_sha256


class VllmEngine:
    """A model in vLLM's process, described at once and loaded when it is first run.

    Args:
        arguments: What ``vllm serve`` would be given: the model, and any of its arguments.
        block_k: Keys of the key blocks that it will serve, which pages have to fit; None for none.
        with_adapters: Whether the LoRA adapters among the arguments are used.
        process: VLLM's process, if it was started already; the engine ends it.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        block_k: int | None = None,
        with_adapters: bool = False,
        process: EngineProcess | None = None,
    ) -> None:
        self._arguments = list(arguments)
        self._block_k = block_k
        self._with_adapters = with_adapters
        self._process = process
        self._log_file: Path | None = None if process is None else process.log_file
        self._described: Description | None = None
        self._workers: Workers | None = None
        self._served: tuple[str | None, bool] = (None, False)
        self._tunes = False
        self._checkpoint: Checkpoint | None = None

    def __enter__(self) -> "VllmEngine":
        """Starts vLLM's process, whose log is kept only if something goes wrong.

        Raises:
            InputError: vLLM refuses the model or an argument.
            OSError: The log cannot be written.
        """
        try:
            process = self._running()
            # That takes seconds, in which the process imports vLLM.
            importlib.import_module("transformers.models.auto.tokenization_auto")
            described = self._described = Description(**self._describe(process))
            self._checkpoint = find_checkpoint(described.model, described.revision)
        except BaseException as error:
            self._end(error)
            raise
        if described.unused:
            print(f"not used here: {', '.join(described.unused)}", file=sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Ends vLLM's process, and removes its log unless the error's line names it."""
        self._stop()
        if self._log_file is not None and str(self._log_file) not in str(error):
            self._log_file.unlink(missing_ok=True)

    @property
    def description(self) -> Description:
        """What vLLM says of the model."""
        assert self._described is not None
        return self._described

    # The tuner's ``Model``.

    @property
    def name(self) -> str:
        """The directory or hub id that the user gave."""
        return self.description.model

    @property
    def fingerprint(self) -> ModelFingerprint:
        """What a served model has to match."""
        return ModelFingerprint.model_validate(self.description.fingerprint)

    @property
    def full_layers(self) -> list[int]:
        """Indices of the layers with full attention."""
        return self.description.full_layers

    @property
    def tunable_layers(self) -> list[int]:
        """Indices of those that also have keys and values of their own."""
        return self.description.tunable_layers

    @property
    def max_length(self) -> int:
        """Longest context that a server with these arguments takes, in tokens."""
        return self.description.max_model_len

    def tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""
        own = Path(self.description.tokenizer)
        return load_tokenizer(self.name, own if own.is_dir() else self.directory())

    def directory(self) -> Path:
        """The directory with the configuration and the tokenizer."""
        assert self._checkpoint is not None
        return self._checkpoint.directory

    def eos_token_id(self) -> Any:
        """Token ids that end an answer, by the configuration."""
        return self.description.eos_token_id

    @property
    def least_longest_length(self) -> int:
        """Any will do: vLLM computes positions as a server does, at every length."""
        return 1

    def digest(self) -> str:
        """Hash of everything that its captured tensors depend on, apart from the tokens."""
        parts = [self.description.digest, self.weights_sha256()]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def weights_sha256(self) -> str | None:
        """Digest of its weight files, which are fetched first; None if vLLM reads others."""
        assert self._checkpoint is not None
        try:
            self._checkpoint.weight_files()
        except InputError:
            return None
        return weights_sha256(self.directory())

    # The tuner's ``Engine``.

    def tuned_on(self) -> TunedOn:
        """See ``tuning.engine.Engine``."""
        described = self.description
        return TunedOn(
            engine=f"vllm {described.version}",
            quantization=described.quantization,
            kv_cache_dtype=described.kv_cache_dtype,
        )

    def capture(
        self,
        windows: Mapping[str, list[int]],
        taken: Capture,
        on_progress: Callable[[float], None],
    ) -> None:
        """See ``tuning.engine.Engine``."""
        self._tunes = True
        shape = self.fingerprint
        counts = HeadCounts(shape.num_heads, shape.num_kv_heads, shape.head_dim)
        workers = self.loaded()
        self.serve(None)
        longest = max(map(len, windows.values()))
        names = {layer: workers.layer(layer, counts, longest) for layer in taken.layers}
        for window, tokens in windows.items():
            files = {name: str(taken.path(layer, window)) for layer, name in names.items()}
            ended = self._running().call(
                "capture", tokens=tokens, files=files, suffixes=workers.suffixes
            )
            workers.check(ended, names.values())
            for layer in taken.layers:
                workers.join(taken.path(layer, window), counts)
            on_progress(float(len(taken.layers)))

    def sparse_model(
        self, block_q: int, block_k: int, adapter: str | None = None
    ) -> EngineSparseModel:
        """See ``tuning.engine.Engine``."""
        self._tunes = True
        return EngineSparseModel(self, block_q, block_k, adapter)

    @property
    def adapters(self) -> list[EngineAdapter]:
        """See ``tuning.engine.Engine``."""
        given = self.description.adapters
        return [EngineAdapter(self, name, sha256) for name, sha256 in given.items()]

    def make_room(self) -> None:
        """Ends vLLM's process if it takes too much; it is started again when it is needed."""
        if not self._stays_loaded():
            self._stop()

    # Both the tuner and the evaluation.

    def loaded(self) -> Workers:
        """Loads the model, if that is not done."""
        if self._workers is None:
            share = memory_share(self._arguments, self._stays_loaded()) if self._tunes else None
            running = self._running()
            facts = running.call("load", gpu_memory_utilization=share, block_k=self._block_k)
            self._workers = Workers(self.name, facts)
        return self._workers

    def serve(self, profile: Profile | None, always_sparse: bool = False) -> None:
        """Has the loaded model serve a profile, or run dense.

        Args:
            profile: The profile; None for dense.
            always_sparse: Whether layers also run sparse where dense is expected to be faster.

        Raises:
            InputError: A layer of the profile cannot run sparse in this engine.
        """
        text = None if profile is None else profile.to_json()
        if self._served == (text, always_sparse):
            return
        dense = self._running().call("serve", profile=text, always_sparse=always_sparse)
        self._served = text, always_sparse
        if dense:
            layer, reason = next(iter(dense.items()))
            raise RunsDenseError(
                f"{self.name}: vLLM runs {len(dense)} layers of the profile dense: layer {layer} "
                f"({reason}; docs/operations.md says what to change)"
            )

    def score(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        keep: str | None = None,
        against: str | None = None,
        adapter: str | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Scores a prompt's tokens, as the model is served at the moment.

        Args:
            tokens: The prompt.
            positions: Positions whose predictions are scored, ascending, without the last.
            keep: Name to keep the predictions under.
            against: Name of those to compare with.
            adapter: Name of the LoRA adapter whose prompt it is.

        Returns:
            The losses in nats, fp32, and the mean KL divergence from those compared with.
        """
        found = self._running().call(
            "score", tokens=list(tokens), positions=list(positions), keep=keep, against=against,
            adapter=adapter,
        )  # fmt: skip
        return torch.tensor(found["losses"]), float(found["kl"])

    def next_tokens(
        self, prompts: Sequence[list[int]], targets: Sequence[int], top: int
    ) -> list[dict[str, Any]]:
        """See ``host.Host``."""
        found: list[dict[str, Any]] = self._running().call(
            "next_tokens", prompts=list(prompts), targets=list(targets), top=top
        )
        return found

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """See ``host.Host``."""
        found: list[list[int]] = self._running().call(
            "generate", prompts=[list(each) for each in prompts], num_tokens=num_tokens
        )
        return found

    def products(self) -> dict[str, float]:
        """Block products so far, by outcome."""
        found: dict[str, float] = self._running().call("products")
        return found

    def fallbacks(self) -> dict[str, float]:
        """Prefills that layers left dense so far, by reason."""
        found: dict[str, float] = self._running().call("fallbacks")
        return found

    def _stays_loaded(self) -> bool:
        assert self._checkpoint is not None
        described = self.description
        return stays_loaded(
            self._arguments, self._checkpoint, described.num_ranks, described.cache_bytes
        )

    def _stop(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process, self._workers, self._served = None, None, (None, False)

    def _running(self) -> EngineProcess:
        if self._process is None:
            self._log_file = self._log_file or new_log()
            self._process = EngineProcess(self._log_file)
            if self._described is not None:
                self._describe(self._process)
        return self._process

    def _describe(self, process: EngineProcess) -> Any:
        return process.call(
            "describe", arguments=self._arguments, with_adapters=self._with_adapters
        )
