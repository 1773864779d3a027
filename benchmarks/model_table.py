"""Writes docs/models.md's table: what runs sparse in models that are served a lot.

    python -m benchmarks.model_table

For each configuration in docs/models/ it plans the layers as ``vllm_afbs.check`` does, with a
profile in which every head of every full-attention layer is sparse. It needs no weights.
"""

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.inspection import inspect_models_here
from benchmarks.profiles import uniform_profile
from vllm_afbs import compat
from vllm_afbs.check.layers import parse_serve_arguments, plan_server, server_config
from vllm_afbs.check.refusals import RefusedError
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.layers import full_layers, layer_kinds, tunable_layers
from vllm_afbs.profile.schema import LayerProfile, Profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_afbs.check.layers import Answer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
CONFIGURATIONS = PAGE.with_suffix("")
BEGIN, END = "<!-- begin: python -m benchmarks.model_table -->", "<!-- end -->"
LONGEST_CONTEXT = 131_072

KINDS = {
    "sliding_attention": "attend to windows of {sliding_window:,}",
    "chunked_attention": "attend to chunks of {attention_chunk_size:,}",
    "linear_attention": "have linear attention or Mamba",
    "mamba": "are Mamba",
    "moe": "are experts without attention",
    "conv": "are convolutions",
}
"""What layers without full attention do, by the kind that a configuration names."""


@dataclass(frozen=True)
class Model:
    """A configuration in docs/models/.

    Attributes:
        model: The hub id.
        source: Where the configuration's fields were read.
        config: The fields of config.json that make the layers; of a multimodal model, those of its
            text part, with the class that vLLM's wrapper makes of it.
        wrapper: The class of the whole multimodal model; None for a language model.
        not_made: Why this table does not ask vLLM for the layers; None if it does.
    """

    model: str
    source: str
    config: Mapping[str, Any]
    wrapper: str | None = None
    not_made: str | None = None


@dataclass(frozen=True)
class Row:
    """What the table says about a model."""

    model: str
    sparse: str
    others: str
    planned_from: str

    def __str__(self) -> str:
        return f"| {self.model} | {self.sparse} | {self.others} | {self.planned_from} |"


def models() -> list[Model]:
    """The committed configurations, by hub id."""
    found = [
        Model(**json.loads(path.read_text(encoding="utf-8")))
        for path in CONFIGURATIONS.glob("*.json")
    ]
    return sorted(found, key=lambda each: each.model.lower())


def table() -> str:
    """The table, in Markdown."""
    inspect_models_here()
    head = ["| model | layers sparse | other layers | planned from |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(str(row_of(each)) for each in models())])


def row_of(model: Model) -> Row:
    """Plans one model's layers and describes them."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_atomically(directory / "config.json", json.dumps(model.config))
        text = _hugging_face_config(directory).get_text_config()
        if model.not_made is not None:
            sparse = f"{len(tunable_layers(text))} of {text.num_hidden_layers}"
            return Row(model.model, sparse, _others(text), f"configuration: {model.not_made}")
        origin = f"layers, of the text part of `{model.wrapper}`" if model.wrapper else "layers"
        try:
            config, answer = _plan(directory, text)
        except RefusedError as error:
            own = re.fullmatch(".* has (.*), and --attention-backend afbs .*", str(error))
            if own is None:
                raise
            return Row(
                model.model, "none: refused", f"{text.num_hidden_layers} have {own[1]}", origin
            )
        return _described(model, text, config, answer, origin)


def _described(model: Model, text: Any, config: "VllmConfig", answer: "Answer", origin: str) -> Row:
    summary = answer.summary
    reasons = [f"{count} dense: {reason}" for reason, count in summary.dense.most_common()]
    foreign = [
        layer for layer in compat.attention_layers(config, None).values()
        if not compat.is_ours(layer)
    ]  # fmt: skip
    if foreign:
        sizes = sorted({(layer.head_size, layer.head_size_v) for layer in foreign})
        heads = ", ".join(f"{size} for keys and {value} for values" for size, value in sizes)
        reasons.append(f"{len(foreign)} have heads of {heads}, with a backend for such heads")
    elif summary.num_others == text.num_hidden_layers - len(full_layers(text)):
        reasons.append(_others(text))
    else:
        raise ValueError(f"{model.model}: {summary}, which its configuration does not say")
    if answer.notes:
        origin = "configuration: in vLLM " + "; ".join(map(_short, answer.notes))
    sparse = f"{summary.num_sparse} of {text.num_hidden_layers}"
    return Row(model.model, sparse, "; ".join(filter(None, reasons)), origin)


def _short(note: str) -> str:
    """The exception in the note that vLLM could not make a model."""
    found = re.search(r"\(\w+: (.*)\); the answer follows from the configuration", note)
    if found is None:
        raise ValueError(f"a note that the table has no words for: {note}")
    return f"`{found[1]}`"


def _others(text: Any) -> str:
    """What the layers without full attention do, by a configuration."""
    full = set(full_layers(text))
    kinds = layer_kinds(text) or []
    counts = Counter(kind for index, kind in enumerate(kinds) if index not in full)
    fields = {
        name: getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")
    }
    return "; ".join(
        f"{count} {KINDS[kind].format(**fields)}" for kind, count in sorted(counts.items())
    )


def _all_sparse(text: Any) -> Profile:
    """A profile in which every head of every full-attention layer is sparse."""
    longest = min(text.max_position_embeddings, LONGEST_CONTEXT)
    fingerprint = ModelFingerprint.from_config(text)
    profile = uniform_profile(fingerprint, tau=0.9, sparsity=0.5, lengths=[1024, longest])
    full = set(full_layers(text))
    layers = [
        layer if index in full else LayerProfile(levels=[])
        for index, layer in enumerate(profile.layers)
    ]
    return profile.model_copy(update={"layers": layers})


def _hugging_face_config(directory: Path) -> Any:
    from vllm.transformers_utils.config import get_config

    return get_config(directory, trust_remote_code=False)


def _plan(directory: Path, text: Any) -> "tuple[VllmConfig, Answer]":
    arguments = ["--attention-backend", "afbs", "--dtype", "bfloat16", "--skip-tokenizer-init"]
    if full_layers(text):
        path = directory / "profile.json"
        write_atomically(path, _all_sparse(text).to_json())
        arguments += ["--additional-config", json.dumps({"afbs": {"profile": str(path)}})]
    config = server_config(parse_serve_arguments([str(directory), *arguments]))
    return config, plan_server(config)


def with_table(page: str, new: str) -> str:
    """Puts a table between the markers of a page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that has the markers")
    page: Path = parser.parse_args().page
    old = page.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        parser.error(f"{page}: the lines {BEGIN} and {END} expected, between which the table goes")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    compat.active_platform()
    write_atomically(page, with_table(old, table()))


if __name__ == "__main__":
    main()
