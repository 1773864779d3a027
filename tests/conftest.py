"""What several test modules share."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu``, visibly, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The checkpoint of SmolLM2-135M-Instruct, from the demo's cache."""
    from vllm_afbs.demo.assets import smollm2_checkpoint

    return smollm2_checkpoint()
