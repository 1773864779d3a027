"""Writes the queries, keys and values of attention layers to files while vLLM computes a prompt.

A layer's ``forward`` is wrapped for the time of one prompt, so servers pay nothing for this. What
it is given is what sparse prefill would be given: after the rotary embedding and any norms, on this
rank's heads, from weights of any quantisation. An FP8 cache's rounding is applied to what is kept.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_afbs import compat
from vllm_afbs.captures import HeadCounts, LayerWriter

CACHE_DTYPES = {
    "auto": None,
    "float16": None,
    "bfloat16": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""What keys and values are rounded to in a cache of each type that can be recorded, if at all."""
_QUERY_DTYPE = torch.float8_e4m3fn


class Recording:
    """Records one prompt, which has to be the only one that is computed.

    Args:
        layers: vLLM's attention layers to record, by the file to write.
        length: Tokens of the prompt.

    Raises:
        OSError: A file cannot be written.
    """

    def __init__(self, layers: Mapping[Path, Any], length: int) -> None:
        self._restores: list[Callable[[], None]] = []
        self._length = length
        self._error: OSError | None = None
        self._writers: dict[Path, LayerWriter] = {}
        for path, layer in layers.items():
            impl = compat.attention_impl(layer)
            counts = HeadCounts(impl.num_heads, impl.num_kv_heads, impl.head_size)
            self._writers[path] = LayerWriter(
                path,
                counts,
                length,
                float(impl.scale),
                impl.sinks,
                float(impl.logits_soft_cap or 0),
            )
        for path, layer in layers.items():
            self._wrap(layer.impl, self._writers[path])

    def end(self) -> int:
        """Gives the layers their own ``forward`` back.

        Returns:
            The number of layers of which every row was seen.

        Raises:
            OSError: A file could not be written.
        """
        for restore in self._restores:
            restore()
        for writer in self._writers.values():
            writer.close()
        if self._error is not None:
            raise self._error
        return sum(writer.num_written == self._length for writer in self._writers.values())

    def _wrap(self, impl: Any, writer: LayerWriter) -> None:
        attend = impl.forward
        own = vars(impl).get("forward")

        def forward(
            layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any,
            *others: Any, **named: Any,
        ) -> Any:  # fmt: skip
            if metadata is not None:  # vLLM warms up without
                self._record(layer, writer, metadata.num_actual_tokens, query, key, value)
            return attend(layer, query, key, value, cache, metadata, *others, **named)

        def restore() -> None:
            if own is None:
                del impl.forward
            else:
                impl.forward = own

        impl.forward = forward
        self._restores.append(restore)

    def _record(
        self, layer: Any, writer: LayerWriter, num_tokens: int, *tensors: torch.Tensor
    ) -> None:
        # Rows beyond the prompt's are those of tokens that it is continued with.
        num_rows = min(num_tokens, self._length - writer.num_written)
        if num_rows <= 0 or self._error is not None:
            return
        query, key, value = (each[:num_rows] for each in tensors)
        if query.dtype == _QUERY_DTYPE:
            query = query.to(torch.bfloat16) * _by_head(layer._q_scale, query)
        if (stored := CACHE_DTYPES[layer.impl.kv_cache_dtype]) is not None:
            key = _rounded(key, layer._k_scale, stored)
            value = _rounded(value, layer._v_scale, stored)
        try:
            writer.add(query, key, value)
        except OSError as error:
            # Raised here, it would end vLLM's engine.
            self._error = error


def _by_head(scale: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A scale per tensor or per KV head, for rows of ``[num_rows, heads, head_dim]``."""
    if scale.numel() == 1:
        return scale.to(torch.bfloat16)
    return scale.repeat_interleave(rows.shape[1] // scale.numel())[:, None].to(torch.bfloat16)


def _rounded(rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows as a cache of a narrow type gives them back."""
    factor = _by_head(scale, rows).float()
    limit = torch.finfo(dtype).max
    stored = (rows.float() / factor).clamp(-limit, limit).to(dtype)
    return (stored.float() * factor).to(torch.bfloat16)
