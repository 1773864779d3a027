"""What several test modules share."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_afbs.profile.schema import Profile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked ``gpu``, visibly, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Keeps vLLM from starting a process for each class of model that a test uses.

    Where torch knows CUDA, vLLM's processes have their reason, and tests on a GPU run as a server.
    """
    if "vllm" not in sys.modules:
        return
    import torch

    from benchmarks.inspection import inspect_models_here

    if torch.version.cuda is None:
        inspect_models_here()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Our log's lines, whether or not vLLM has set its loggers up."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.afbs")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The checkpoint of SmolLM2-135M-Instruct, from the demo's cache."""
    from vllm_afbs.demo.assets import smollm2_checkpoint

    return smollm2_checkpoint()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random model of two layers."""
    from tests.tuning_jobs import save_tiny_model

    directory = tmp_path_factory.mktemp("tiny")
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_profile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> "Profile":
    """What one uninterrupted process finds for it."""
    from tests.tuning_jobs import command
    from vllm_afbs import tune
    from vllm_afbs.profile.file import load_profile

    output = tmp_path_factory.mktemp("whole") / "profile.json"
    assert tune.main(command(tiny_model, output, "--tolerance", "0.2")) == 0
    assert not Path(f"{output}.work").exists()
    return load_profile(output)
