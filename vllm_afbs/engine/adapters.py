"""The LoRA adapters of ``--lora-modules``, read and checked before anything is loaded."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from vllm_afbs import compat
from vllm_afbs.check.refusals import RefusedError
from vllm_afbs.errors import one_line
from vllm_afbs.profile.weights import adapter_sha256


def requests(given: Namespace) -> list[LoRARequest]:
    """What vLLM has to be asked with for each adapter, in their order.

    Args:
        given: The arguments of ``vllm serve``.

    Raises:
        RefusedError: LoRA is off, or two adapters have the same name.
    """
    modules = given.lora_modules or []
    if modules and not given.enable_lora:
        raise RefusedError("--lora-modules: --enable-lora expected beside it")
    names = [module.name for module in modules]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RefusedError(
            f"--lora-modules: a name for each adapter expected, got {twice[0]} twice"
        )
    return [
        LoRARequest(module.name, number, module.path, is_3d_lora_weight=module.is_3d_lora_weight)
        for number, module in enumerate(modules, 1)
    ]


def digests(adapters: Sequence[LoRARequest], lora_config: Any) -> dict[str, str]:
    """Digest of each adapter's files, by its name.

    Args:
        adapters: The adapters.
        lora_config: vLLM's, which has to allow them.

    Raises:
        RefusedError: There is no such adapter, vLLM does not run it, or two have the same files.
    """
    found: dict[str, str] = {}
    for each in adapters:
        where = f"--lora-modules: {each.lora_name}"
        path = compat.adapter_path(each)
        digest = None if path is None else adapter_sha256(Path(path))
        if path is None or digest is None:
            raise RefusedError(
                f"{where}: a directory with adapter_config.json and the adapter's weights "
                f"expected, got {each.lora_path}"
            )
        try:
            PEFTHelper.from_local_dir(path, None).validate_legal(lora_config)
        except Exception as error:  # whatever a configuration makes vLLM raise
            raise RefusedError(f"{where}: {one_line(error)}") from None
        if digest in found.values():
            raise RefusedError(f"{where}: other files expected than those of adapters before it")
        found[each.lora_name] = digest
    return found
