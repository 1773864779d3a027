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
_SINK = "sink"


@dataclass(frozen=True)
class LayerTensors:
    """One layer's attention inputs over one window of text.

    Attributes:
        query: ``[length, num_heads, head_dim]``, bf16.
        key: ``[length, num_kv_heads, head_dim]``, bf16.
        value: Like ``key``.
        softmax_scale: Factor of the scores.
        sink: A logit of each query head that takes part in every row's softmax and has no value,
            ``[num_heads]``, fp32; None for none.
        softcap: Bounds the scaled scores: ``softcap * tanh(scores / softcap)``; 0 for none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    softmax_scale: float
    sink: torch.Tensor | None = None
    softcap: float = 0.0

    def to(self, device: torch.device) -> "LayerTensors":
        """The same tensors on a device."""
        query, key, value = (each.to(device) for each in (self.query, self.key, self.value))
        sink = None if self.sink is None else self.sink.to(device)
        return replace(self, query=query, key=key, value=value, sink=sink)


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
            facts = file.metadata()
            scale, softcap = float(facts["softmax_scale"]), float(facts.get("softcap", 0))
            query, key, value = (file.get_tensor(name) for name in ("query", "key", "value"))
            sink = file.get_tensor(_SINK) if _SINK in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot read the capture: {one_line(error)}") from None
    return LayerTensors(query, key, value, scale, sink, softcap)


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
        sink: See ``LayerTensors``.
        softcap: See ``LayerTensors``.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        counts: HeadCounts,
        length: int,
        softmax_scale: float,
        sink: torch.Tensor | None = None,
        softcap: float = 0.0,
    ) -> None:
        self._path, self._length = path, length
        self._partial = path.with_name(f"{path.name}.partial")
        widths = {"query": counts.num_heads} | dict.fromkeys(("key", "value"), counts.num_kv_heads)
        facts = {"softmax_scale": repr(softmax_scale), "softcap": repr(softcap)}
        header: dict[str, Any] = {"__metadata__": facts}
        end = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name, heads in widths.items():
            row_bytes = 2 * heads * counts.head_dim
            self._places[name] = end, row_bytes
            start, end = end, end + length * row_bytes
            shape = [length, heads, counts.head_dim]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        own = b"" if sink is None else _bytes(sink.to(torch.float32))
        if sink is not None:
            offsets = [end, end + len(own)]
            header[_SINK] = {"dtype": "F32", "shape": [len(sink)], "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.num_written = 0
        self._write(len(text).to_bytes(8, "little") + text, 0)
        self._write(own, self._data_start + end)

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the next rows, ``[num_rows, heads, head_dim]`` each, of any floating dtype.

        Raises:
            OSError: The disk is full.
        """
        for name, rows in (("query", query), ("key", key), ("value", value)):
            start, row_bytes = self._places[name]
            at = self._data_start + start + self.num_written * row_bytes
            self._write(_bytes(rows.to(torch.bfloat16)), at)
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

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self._path)) from None


def _bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, on the CPU; not copied if they are there."""
    data: memoryview = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return data.cast("B")


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
