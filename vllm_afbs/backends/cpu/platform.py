"""vLLM's CPU platform with ``--attention-backend afbs``, which checks the profile first."""

from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from vllm_afbs import compat
from vllm_afbs.backends import adapters
from vllm_afbs.observability.membership import begin_server
from vllm_afbs.serving import admission

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class AfbsCpuPlatform(CpuPlatform):
    """Differs from vLLM's CPU platform only if the afbs backend is chosen."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Names the backend's class.

        Raises:
            NotImplementedError: The afbs backend is chosen for attention that it cannot run.
        """
        if not compat.is_afbs(selected_backend):
            return str(
                super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
            )
        for attribute, what in (
            ("use_mla", "multi-head latent attention"),
            ("use_sparse", "a model's own sparse attention"),
        ):
            if getattr(attn_selector_config, attribute):
                raise NotImplementedError(f"--attention-backend afbs does not support {what}")
        return compat.CPU_BACKEND_PATH

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """Names the class of the LoRA layers' wrapper."""
        return adapters.wrapper_path(
            super().get_punica_wrapper(), "vllm_afbs.backends.cpu.adapters.AfbsPunicaWrapperCPU"
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
