"""LoRA on the CPU: vLLM's wrapper, which also notes whether a step has an active adapter."""

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_afbs.backends.adapters import NotesAdapters


class AfbsPunicaWrapperCPU(NotesAdapters, PunicaWrapperCPU):
    """What LoRA layers ask for a step's adapters."""
