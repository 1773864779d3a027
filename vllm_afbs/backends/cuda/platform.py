"""vLLM's CUDA platform, which checks the profile before anything is loaded."""

from typing import TYPE_CHECKING, Any

from vllm.platforms.cuda import CudaPlatform

from vllm_afbs import compat
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
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Names the backend's class; arguments are vLLM's.

        Raises:
            ValueError: The chosen backend cannot run attention of this kind.
        """
        is_ours = compat.is_afbs(selected_backend)
        if not is_ours or not attn_selector_config.use_mm_prefix or compat.composites() is None:
            return str(
                super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
            )
        from vllm_afbs.backends.cuda.images import AfbsImagesBackend

        reasons = AfbsImagesBackend.validate_configuration(
            device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"--attention-backend afbs cannot run a layer of this model: {'; '.join(reasons)}"
            )
        return compat.CUDA_IMAGES_BACKEND_PATH

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Refuses models that cannot be served and profiles that do not fit the model.

        Nothing is loaded before.

        Raises:
            SystemExit: With one line that says why; see ``admission.admit_or_exit``.
        """
        super().check_and_update_config(vllm_config)
        if admission.admit_or_exit(vllm_config):
            if vllm_config.model_config.is_mm_prefix_lm and compat.composites() is None:
                raise SystemExit(f"vllm-afbs: {_text_only(vllm_config)}")
            begin_server(vllm_config)


def _text_only(vllm_config: "VllmConfig") -> str:
    """How to serve a model without its images, in versions that cannot compose backends.

    These versions ask for masks for images even if the model gets none.
    """
    model = vllm_config.model_config
    override = '{"is_mm_prefix_lm": false}'
    if getattr(model.hf_text_config, "use_bidirectional_attention", None) == "vision":  # Gemma 4
        override = '{"text_config": {"use_bidirectional_attention": null}}'
    return (
        f"{model.model}: its image tokens see later tokens of their image, and in vLLM "
        f"{compat.installed_version()} --attention-backend afbs runs causal attention only. Take "
        "vLLM 0.32 or later, or start text-only with --limit-mm-per-prompt '{\"image\": 0}' "
        f"--hf-overrides '{override}'"
    )
