"""Captured attention inputs on disk: what the tuner reads, and whoever runs the model writes.

A capture holds, for each layer and window of text, the layer's Q, K and V after the rotary
embedding, in bf16 as in the server's cache. Attention is causal, so the tensors of a shorter
context are a prefix. Each is one safetensors file, which is complete as soon as it has its name.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_afbs.errors import InputError, one_line

CALIBRATION = "calibration"
"""Name of the calibration window; the others are held out."""


@dataclass(frozen=True)
class LayerTensors:
    """One layer's attention inputs over one window of text.

    Attributes:
        query: ``[length, num_heads, head_dim]``, bf16.
        key: ``[length, num_kv_heads, head_dim]``, bf16.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax_scale: float

    def to(self, device: torch.device) -> "LayerTensors":
        """The same tensors on a device."""
        query, key, value = (each.to(device) for each in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)


@dataclass(frozen=True)
class Capture:
    """The captured tensors, on disk.

    Attributes:
        directory: Holds one safetensors file per layer and window.
        layers: The layers that are kept.
        held_out: Names of the held-out windows; the other one is ``CALIBRATION``.
    """

    directory: Path
    layers: tuple[int, ...]
    held_out: tuple[str, ...]

    def load(self, layer: int, window: str) -> LayerTensors:
        """Reads one layer's tensors over one window.

        Raises:
            InputError: The file is missing or damaged.
        """
        return read_tensors(self.path(layer, window))

    def path(self, layer: int, window: str) -> Path:
        """Where one layer's tensors over one window are kept."""
        return self.directory / f"layer-{layer:03d}.{window}.safetensors"

    def missing(self) -> dict[str, int]:
        """The windows that are not captured completely, and how many layers each lacks."""
        lacking = {
            window: sum(not self.path(layer, window).is_file() for layer in self.layers)
            for window in (CALIBRATION, *self.held_out)
        }
        return {window: count for window, count in lacking.items() if count}


def read_tensors(path: Path) -> LayerTensors:
    """Reads a file that ``LayerWriter`` wrote.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            scale = float(file.metadata()["softmax_scale"])
            query, key, value = (file.get_tensor(name) for name in ("query", "key", "value"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the capture: {one_line(error)}") from None
    return LayerTensors(query, key, value, scale)


@dataclass(frozen=True)
class HeadCounts:
    """What a layer's rows consist of.

    Attributes:
        num_heads: Number of query heads.
        num_kv_heads: Number of KV heads.
        head_dim: Size of a head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's captured rows."""
        return 2 * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)


class LayerWriter:
    """Writes one file, a few rows at a time and in order; no more than these are ever held.

    Args:
        path: The file. It gets its name when the last row is written.
        counts: What a row consists of.
        length: Rows of the window.
        softmax_scale: Factor of the scores.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, counts: HeadCounts, length: int, softmax_scale: float) -> None:
        self._path, self._length = path, length
        self._partial = path.with_name(f"{path.name}.partial")
        widths = {"query": counts.num_heads} | dict.fromkeys(("key", "value"), counts.num_kv_heads)
        header: dict[str, Any] = {"__metadata__": {"softmax_scale": repr(softmax_scale)}}
        end = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name, heads in widths.items():
            row_bytes = 2 * heads * counts.head_dim
            self._places[name] = end, row_bytes
            start, end = end, end + length * row_bytes
            shape = [length, heads, counts.head_dim]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.num_written = 0
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the next rows, ``[num_rows, heads, head_dim]`` each, of any floating dtype.

        Raises:
            OSError: The disk is full.
        """
        for name, rows in (("query", query), ("key", key), ("value", value)):
            start, row_bytes = self._places[name]
            raw = rows.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy()
            self._write(raw.data, self._data_start + start + self.num_written * row_bytes)
        self.num_written += len(query)
        if self.num_written == self._length:
            self._partial.replace(self._path)
            self.close()

    def close(self) -> None:
        """Closes the file, and removes one that is not complete."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._partial.unlink(missing_ok=True)

    def _write(self, data: "bytes | memoryview", at: int) -> None:
        view = memoryview(data).cast("B")
        try:
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def check_space(directory: Path, needed_bytes: int) -> None:
    """Refuses to begin a capture that the disk has no room for.

    Raises:
        InputError: The disk has less room.
    """
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise InputError(
            f"{directory}: {needed_bytes / 1e9:.1f} GB expected for captured tensors, "
            f"{free_bytes / 1e9:.1f} GB free"
        )
