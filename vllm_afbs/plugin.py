"""The entry point that vLLM calls where vllm-afbs is installed.

Every process of vLLM resolves its platform first, and a spawned worker does so before it unpickles
its configuration. The backend's name and the metrics are therefore registered here.
"""

from vllm_afbs import compat
from vllm_afbs.observability import metrics


def platform() -> str | None:
    """The ``vllm.platform_plugins`` entry point.

    Returns:
        The qualified name of our platform on vLLM's CPU and CUDA builds. None on other builds,
        where vLLM then chooses the platform itself.
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
