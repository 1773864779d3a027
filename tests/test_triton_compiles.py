"""Every Triton kernel compiled to machine code for the GPUs of interest, without one.

The public operations are called as a server calls them, on tensors that nothing reads: Triton's
driver is replaced by one that only names the target, and every launch stops after compiling.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.batches import Batch, draw_sinks, make_batch, quantise
from tests.problems import SCALE
from vllm_afbs.kernels import (
    attend_tiles,
    build_tile_lists,
    select_tile_lists,
    select_tiles,
    sparse_prefill,
)

CAPABILITIES = (80, 89, 90, 100)
KERNELS = {
    "_pool_block",
    "_unpack_block",
    "_score_key_blocks",
    "_key_block_self_similarity",
    "_select_tile",
    "_prefill_tile",
}
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a program may have, by the CUDA C++ programming guide."""


def ptxas_is_missing(capability: int) -> str:
    """Why no machine code can be made for this GPU, or nothing."""
    name = "ptxas_blackwell" if capability >= 100 else "ptxas"
    try:
        getattr(triton.knobs.nvidia, name).path  # noqa: B018
    except RuntimeError as error:
        return f"needs ptxas: {error}"
    return ""


@pytest.fixture
def compiled(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, list[Any]]]:
    """Makes launches compile for the target; what they compiled, by kernel."""
    if missing := ptxas_is_missing(capability):
        pytest.skip(missing)
    kernels: dict[str, list[Any]] = {}
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.setdefault(self.fn.__name__, []).append(kernel)

    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        # Compiled kernels are kept by device, so each target is a device of its own.
        get_current_device=lambda: capability,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: target,
    )
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield kernels


def call_everything(batch: Batch) -> None:
    step, thresholds = batch.step, batch.problems[0].thresholds
    num_kept = torch.zeros(step.num_heads, dtype=torch.int64)
    output = torch.empty_like(step.query, dtype=torch.bfloat16)
    for chosen in (thresholds, dataclasses.replace(thresholds, has_theta=False)):
        select_tile_lists(step, chosen, SCALE, num_kept)
        tiles = select_tiles(step, chosen, SCALE, num_kept)
    attend_tiles(step, tiles, output, lambda *_: None)
    everything = torch.ones(step.num_heads, step.blocks.num_blocks, step.blocks.max_k_blocks)
    lists = build_tile_lists(everything.bool())
    for softcap in (0.0, 30.0):
        sparse_prefill(step, lists, output, SCALE, softcap=softcap)
    with_sinks = dataclasses.replace(step, sinks=draw_sinks(step.num_heads, "cpu"))
    attend_tiles(with_sinks, tiles, output, lambda query, *_: torch.empty(len(query)))
    sparse_prefill(with_sinks, lists, output, SCALE, softcap=30.0)


def check_compiled(compiled: dict[str, list[Any]], capability: int, batch: Batch) -> None:
    call_everything(batch)
    assert compiled.keys() == KERNELS
    for name, kernels in compiled.items():
        for kernel in kernels:
            assert kernel.asm["cubin"].startswith(b"\x7fELF")
            assert kernel.metadata.shared <= SHARED_BYTES[capability], name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles(compiled: dict[str, list[Any]], capability: int) -> None:
    batch = make_batch([(300, 640)], 128, 128, 128, torch.bfloat16, "cpu", True)
    check_compiled(compiled, capability, batch)


SHAPES = [(128, 64), (64, 128), (64, 64)]


@pytest.mark.parametrize(
    ("capability", "shape", "head_dim"),
    [
        *((90, shape, 128) for shape in SHAPES),
        (90, (64, 64), 64),
        (89, (64, 64), 128),  # with the least shared memory
    ],
)
def test_every_kernel_compiles_for_every_shape(
    compiled: dict[str, list[Any]], capability: int, shape: tuple[int, int], head_dim: int
) -> None:
    block_q, block_k = shape
    batch = make_batch(
        [(300, 640)], block_q, 64, head_dim, torch.bfloat16, "cpu", True, block_k=block_k
    )
    check_compiled(compiled, capability, batch)


@pytest.mark.parametrize("capability", [89, 90])
def test_every_kernel_compiles_for_fp8(compiled: dict[str, list[Any]], capability: int) -> None:
    """GPUs before 8.9 do not know E4M3."""
    batch = make_batch([(300, 640)], 128, 128, 128, torch.bfloat16, "cpu", True)
    quantise(batch, torch.float8_e4m3fn, with_query=True, per_head=True)
    check_compiled(compiled, capability, batch)
