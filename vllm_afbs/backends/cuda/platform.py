"""vLLM's CUDA platform, which checks the profile before anything is loaded."""

from typing import TYPE_CHECKING

from vllm.platforms.cuda import CudaPlatform

from vllm_afbs.backends import adapters
from vllm_afbs.observability.membership import begin_server
from vllm_afbs.serving import admission

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AfbsCudaPlatform(CudaPlatform):  # type: ignore[misc, valid-type]
    """Differs from vLLM's CUDA platform only if the afbs backend is chosen."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """Names the class of the LoRA layers' wrapper."""
        return adapters.wrapper_path(
            super().get_punica_wrapper(), "vllm_afbs.backends.cuda.adapters.AfbsPunicaWrapperGPU"
        )

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuses a profile that does not fit the model, before anything is loaded.

        Raises:
            SystemExit: The profile was refused; see ``admission.admit_or_exit``.
        """
        super().check_and_update_config(vllm_config)
        if admission.admit_or_exit(vllm_config):
            begin_server(vllm_config)
