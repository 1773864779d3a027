"""Entry point: what vLLM calls when it finds vllm-afbs installed.

vLLM resolves its platform first thing in every process, spawned workers included and before they
unpickle their configuration, so this is where the backend's name and the metrics are registered.
"""

from vllm_afbs import compat
from vllm_afbs.observability import metrics


def platform() -> str | None:
    """The ``vllm.platform_plugins`` entry point.

    Returns:
        The qualified name of our platform on vLLM's CPU and CUDA builds; None elsewhere, which
        leaves the platform to vLLM.
    """
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if cpu_platform_plugin() is not None:
        compat.register_backend(compat.CPU_BACKEND_PATH)
        ours = "vllm_afbs.backends.cpu.platform.AfbsCpuPlatform"
    elif cuda_platform_plugin() is not None:
        compat.register_backend(compat.CUDA_BACKEND_PATH)
        ours = "vllm_afbs.backends.cuda.platform.AfbsCudaPlatform"
    else:
        return None
    metrics.publish()
    return ours
