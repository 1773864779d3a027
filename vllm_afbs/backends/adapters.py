"""Which LoRA adapters are active in a step.

An adapter changes queries and keys, and the profile was tuned without it. vLLM's model runners tell
the LoRA layers of a step's adapters before they build the step's metadata. The layers learn of them
through a wrapper, whose class the platform names, so ours listens there.

Steps know adapters by number. Which files a number stands for, vLLM's worker knows when it loads
them, so we also listen there.

The batch descriptor in vLLM's forward context does not do. It is the key of a CUDA graph: in steps
without a graph, which those with long prompts are, model runner V1 says that no adapter is active
whatever is, and so does V2 in some microbatches.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from vllm_afbs import compat
from vllm_afbs.profile.weights import adapter_sha256
from vllm_afbs.serving import configuration

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


@dataclass(frozen=True)
class _Update:
    """What vLLM told a wrapper last.

    Attributes:
        mapping: The adapter's number of each token and each request; 0 for none.
        args: vLLM's.
        kwargs: vLLM's.
        numbers: The numbers of active adapters.
    """

    mapping: "LoRAMapping"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    numbers: frozenset[int]


_LATEST: "WeakKeyDictionary[Any, _Update]" = WeakKeyDictionary()
"""By wrapper. A model has one, and two more if adapters may change its vision tower."""
_DIGESTS: dict[int, str | None] = {}
"""Digest of the files that were loaded last under each number; None if it is unknown."""


class _Wrapper(Protocol):
    def update_metadata(self, mapping: "LoRAMapping", *args: Any, **kwargs: Any) -> None: ...


class NotesAdapters:
    """Mixin for vLLM's wrappers; notes which adapters a step has."""

    def update_metadata(self: _Wrapper, mapping: "LoRAMapping", *args: Any, **kwargs: Any) -> None:
        """Takes the adapters of the next steps; vLLM calls this only if they change.

        Args:
            mapping: The adapter's number of each token and each request; 0 for none.
            args: vLLM's.
            kwargs: vLLM's.
        """
        numbers = frozenset(mapping.index_mapping).union(mapping.prompt_mapping) - {0}
        _LATEST[self] = _Update(mapping, args, kwargs, numbers)
        super().update_metadata(mapping, *args, **kwargs)  # type: ignore[safe-super]


def may_be_active(validated: Set[str] = frozenset()) -> bool:
    """Whether the step has an active adapter, or is not known to have none.

    Args:
        validated: Digests of adapters that do not count.
    """
    numbers = (number for update in _LATEST.values() for number in update.numbers)
    return not _LATEST or any(_DIGESTS.get(number) not in validated for number in numbers)


@contextmanager
def one_prompts_logits(num_rows: int) -> Iterator[None]:
    """Tells the LoRA layers that the next logits are rows of the step's only prompt.

    They expect one row of each request.

    Args:
        num_rows: Number of rows, at most the step's tokens.
    """
    latest = list(_LATEST.items())
    for wrapper, update in latest:
        rows = update.mapping.prompt_mapping[:1] * num_rows
        wrapper.update_metadata(
            replace(update.mapping, prompt_mapping=rows), *update.args, **update.kwargs
        )
    try:
        yield
    finally:
        for wrapper, update in latest:
            wrapper.update_metadata(update.mapping, *update.args, **update.kwargs)


def wrapper_path(stock: str, ours: str) -> str:
    """Names the class of the LoRA layers' wrapper for the model that is being loaded.

    Args:
        stock: vLLM's class.
        ours: A subclass of it with ``NotesAdapters``.
    """
    config = compat.current_config()
    if config is None or not compat.chooses_afbs(config):
        return stock
    if configuration.serves_adapters(config):
        _note_files()
    return ours if configuration.tells_adapters_apart(config) else stock


def _note_files() -> None:
    """Notes the files of every adapter that this process loads from now on."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if load.__module__ == __name__:
        return

    def noted(manager: Any, request: Any) -> Any:
        adapter = load(manager, request)
        path = compat.adapter_path(request)
        _DIGESTS[request.lora_int_id] = None if path is None else adapter_sha256(Path(path))
        return adapter

    WorkerLoRAManager._load_adapter = noted  # type: ignore[method-assign,assignment]
