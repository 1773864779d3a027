"""What the tuner and the evaluation do in each of vLLM's workers: vLLM's ``worker_extension_cls``.

An engine that a user serves has none of this. The driver, ``vllm_afbs.engine``, computes one prompt
at a time between a ``begin`` and an ``end``. All calls take and give JSON.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_afbs import compat
from vllm_afbs.backends.recording import CACHE_DTYPES, Recording
from vllm_afbs.backends.scoring import Scoring
from vllm_afbs.backends.shared import served_builders
from vllm_afbs.profile.file import parse_profile
from vllm_afbs.serving import eligibility, summary

EXTENSION = f"{__name__}.DrivenWorker"


class DrivenWorker:
    """Methods that vLLM adds to its worker."""

    # vLLM's own; a method of the same name here would conflict with it.
    vllm_config: Any
    get_model: Callable[[], Any]
    _afbs_recording: Recording | None
    _afbs_scoring: Scoring | None
    _afbs_dense: dict[str | None, dict[str, Scoring]]

    def afbs_layers(self) -> str:
        """This rank's attention layers: what they are, and which heads of them it has."""
        indices = compat.layer_indices(self.vllm_config)
        facts = []
        for name, layer in compat.attention_layers(self.vllm_config, None).items():
            impl = compat.attention_impl(layer)
            facts.append(
                {
                    "name": name,
                    "index": indices.get(name),
                    "num_heads": impl.num_heads,
                    "num_kv_heads": impl.num_kv_heads,
                    "head_dim": impl.head_size,
                    "window": layer.sliding_window,
                    "obstacle": eligibility.capture_obstacle(layer, CACHE_DTYPES),
                }
            )
        return json.dumps({"num_ranks": compat.tensor_parallel_size(), "layers": facts})

    def afbs_begin_recording(self, request: str) -> None:
        """Begins to write the rows of the next prompt's queries, keys and values.

        Args:
            request: ``files``: the file for each layer by its name; layers of other pipeline stages
                are passed over. ``length``: tokens of the prompt. ``suffixes``: what each
                tensor-parallel rank appends to the files' names.
        """
        asked = json.loads(request)
        suffix = asked["suffixes"][compat.tensor_parallel_rank()]
        layers = compat.attention_layers(self.vllm_config, None)
        chosen = {
            Path(file + suffix): layers[name]
            for name, file in asked["files"].items()
            if name in layers
        }
        self._afbs_recording = Recording(chosen, asked["length"])

    def afbs_end_recording(self) -> str:
        """Ends it; gives the number of complete layers, or why a file could not be written."""
        recording, self._afbs_recording = self._afbs_recording, None
        assert recording is not None
        try:
            return json.dumps({"complete": recording.end()})
        except OSError as error:
            return json.dumps(
                {"errno": error.errno, "message": error.strerror, "file": error.filename}
            )

    def afbs_begin_scoring(self, request: str) -> None:
        """Begins to score the next prompt.

        Args:
            request: ``tokens``; ``positions``: those scored; ``keep``: the name to keep the
                predictions under, or null; ``against``: the name of those to compare with, or null;
                ``adapter``: the LoRA adapter whose predictions they are, or null. Those of one
                adapter are kept until another's come.
        """
        asked = json.loads(request)
        adapter = asked["adapter"]
        if adapter not in getattr(self, "_afbs_dense", {}):
            self._afbs_dense = {adapter: {}}
        kept = self._afbs_dense[adapter]
        against = None if asked["against"] is None else kept[asked["against"]]
        self._afbs_scoring = Scoring(
            self.get_model(),
            asked["tokens"],
            torch.tensor(asked["positions"]),
            asked["keep"] is not None,
            against,
        )
        if asked["keep"] is not None:
            kept[asked["keep"]] = self._afbs_scoring

    def afbs_end_scoring(self) -> str:
        """Ends it; gives the losses and the divergence, or null from ranks without logits."""
        scoring, self._afbs_scoring = self._afbs_scoring, None
        assert scoring is not None
        scoring.end()
        losses = scoring.losses
        if losses is None:
            return "null"
        return json.dumps({"losses": losses.tolist(), "kl": scoring.kl})

    def afbs_serve(self, profile: str | None, always_sparse: bool) -> str:
        """Serves another profile from the next step on; None runs dense.

        Args:
            profile: The profile's JSON.
            always_sparse: Whether layers also run sparse where dense is expected to be faster.

        Returns:
            Why layers run dense that the profile makes sparse, by their index.
        """
        parsed = None if profile is None else parse_profile(profile.encode(), "the driver's")
        for builder in served_builders():
            builder.serve(parsed, always_sparse)
        plans = summary.plans(self.vllm_config).values() if parsed is not None else ()
        return json.dumps(
            {
                plan.layer: plan.dense_reason
                for plan in plans
                if plan.dense_reason not in (None, "profile_dense", "local_attention")
            }
        )

    def afbs_finish_reports(self) -> None:
        """Waits until the metrics hold all work that was done."""
        for builder in served_builders():
            builder.finish_reports()
