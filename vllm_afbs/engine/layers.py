"""The layers of vLLM's workers: which can be captured, and the parts that each rank has written."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_afbs.captures import HeadCounts, LayerWriter, read_tensors
from vllm_afbs.errors import InputError


class RunsDenseError(InputError):
    """VLLM runs layers dense that a profile has sparse."""


class Workers:
    """What vLLM's workers said of their layers.

    Args:
        model: The model's name, for messages.
        facts: What ``DrivenWorker.afbs_layers`` says, worker by worker.

    Attributes:
        suffixes: What each tensor-parallel rank appends to the name of a file that it writes.
    """

    def __init__(self, model: str, facts: Sequence[dict[str, Any]]) -> None:
        self._model = model
        self._facts = facts
        self._num_ranks = max(int(each["num_ranks"]) for each in facts)
        ranks = range(self._num_ranks)
        self.suffixes = [""] if self._num_ranks == 1 else [f".rank{rank}" for rank in ranks]

    def layer(self, index: int, whole: HeadCounts, longest: int) -> str:
        """VLLM's name of a layer that can be captured.

        Args:
            index: Index of the decoder layer.
            whole: What a row of the layer has to consist of, over all ranks.
            longest: Tokens of the longest prompt.

        Raises:
            InputError: The layer is not there, or is not plain causal attention of that shape.
        """
        where = f"{self._model}: layer {index}"
        found = [each for own in self._facts for each in own["layers"] if each["index"] == index]
        if not found:
            raise InputError(f"{where}: one attention layer expected, vLLM has none or several")
        layer = found[0]
        if layer["obstacle"] is not None:
            raise InputError(f"{where}: plain causal attention expected, got {layer['obstacle']}")
        if layer["window"] is not None and layer["window"] < longest:
            raise InputError(f"{where}: no sliding window expected, got {layer['window']} tokens")
        ranks = self._num_ranks
        expected = [whole.num_heads // ranks, max(1, whole.num_kv_heads // ranks), whole.head_dim]
        given = [layer[name] for name in ("num_heads", "num_kv_heads", "head_dim")]
        if given != expected or whole.num_heads % ranks:
            raise InputError(
                f"{where}: {expected[0]} query heads and {expected[1]} KV heads of {expected[2]} "
                f"expected by the configuration on each of {ranks} ranks, got {given[0]}, "
                f"{given[1]} of {given[2]}"
            )
        return str(layer["name"])

    def check(self, ended: Sequence[dict[str, Any]], names: Collection[str]) -> None:
        """Refuses a recording that is not complete.

        Args:
            ended: What ``DrivenWorker.afbs_end_recording`` says, worker by worker.
            names: The layers that were to be recorded.

        Raises:
            OSError: A file could not be written.
            InputError: A layer did not see every row.
        """
        for own, facts in zip(ended, self._facts, strict=True):
            if "errno" in own:
                raise OSError(own["errno"], own["message"], own["file"])
            expected = sum(layer["name"] in names for layer in facts["layers"])
            if own["complete"] != expected:
                raise InputError(
                    f"{self._model}: attention of {expected} layers expected, "
                    f"{own['complete']} were captured completely"
                )

    def join(self, path: Path, whole: HeadCounts) -> None:
        """Makes one file of those that the ranks wrote.

        If there are fewer KV heads than ranks, several ranks have the same one, which is kept once.

        Args:
            path: The file.
            whole: What a row of the layer consists of, over all ranks.

        Raises:
            OSError: The file cannot be written.
        """
        if self._num_ranks == 1:
            return
        files = [path.with_name(path.name + suffix) for suffix in self.suffixes]
        parts = [read_tensors(file) for file in files]
        copies = max(1, self._num_ranks // whole.num_kv_heads)
        kept = list(itertools.islice(parts, 0, None, copies))
        query = torch.cat([part.query for part in parts], 1)
        key, value = (
            torch.cat([getattr(part, name) for part in kept], 1) for name in ("key", "value")
        )
        sinks = [part.sink for part in parts if part.sink is not None]
        writer = LayerWriter(
            path,
            whole,
            len(query),
            parts[0].softmax_scale,
            torch.cat(sinks) if sinks else None,
            parts[0].softcap,
        )
        writer.add(query, key, value)
        for file in files:
            file.unlink()
