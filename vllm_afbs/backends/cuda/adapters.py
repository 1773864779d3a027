"""LoRA on CUDA: vLLM's wrapper, which also notes whether a step has an active adapter."""

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from vllm_afbs.backends.adapters import NotesAdapters


# vLLM marks it final for type checkers; at run time it is a class like any other.
class AfbsPunicaWrapperGPU(NotesAdapters, PunicaWrapperGPU):  # type: ignore[misc]
    """What LoRA layers ask for a step's adapters."""
