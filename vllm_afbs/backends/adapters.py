"""Which steps have an active LoRA adapter.

An adapter changes queries and keys, and the profile was tuned without it. vLLM's model runners tell
the LoRA layers of a step's adapters before they build the step's metadata. The layers learn of them
through a wrapper, whose class the platform names, so ours listens there.

The batch descriptor in vLLM's forward context does not do. It is the key of a CUDA graph: in steps
without a graph, which those with long prompts are, model runner V1 says that no adapter is active
whatever is, and so does V2 in some microbatches.
"""

from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from vllm_afbs import compat
from vllm_afbs.serving import configuration

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping

_HAVE_ADAPTER: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()
"""Whether the latest step has an active adapter, by wrapper.

A model has one wrapper, and two more if adapters may change its vision tower.
"""


class _Wrapper(Protocol):
    def update_metadata(self, mapping: "LoRAMapping", *args: Any, **kwargs: Any) -> None: ...


class NotesAdapters:
    """Mixin for vLLM's wrappers; notes whether a step has an active adapter."""

    def update_metadata(self: _Wrapper, mapping: "LoRAMapping", *args: Any, **kwargs: Any) -> None:
        """Takes the adapters of the next steps; vLLM calls this only if they change.

        Args:
            mapping: The adapter's number of each token and each request; 0 for none.
            args: vLLM's.
            kwargs: vLLM's.
        """
        _HAVE_ADAPTER[self] = any(mapping.index_mapping) or any(mapping.prompt_mapping)
        super().update_metadata(mapping, *args, **kwargs)  # type: ignore[safe-super]


def may_be_active() -> bool:
    """Whether the step has an active adapter, or is not known to have none."""
    return not _HAVE_ADAPTER or any(_HAVE_ADAPTER.values())


def wrapper_path(stock: str, ours: str) -> str:
    """Names the class of the LoRA layers' wrapper for the model that is being loaded.

    Args:
        stock: vLLM's class.
        ours: A subclass of it with ``NotesAdapters``.
    """
    config = compat.current_config()
    if config is None or not compat.chooses_afbs(config):
        return stock
    return ours if configuration.tells_adapters_apart(config) else stock
