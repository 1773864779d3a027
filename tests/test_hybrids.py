"""Tiny hybrid models on the CPU: full layers run sparse, and every other layer is vLLM's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tests import hybrids
from tests.hybrid_engines import Run, engine, run_engines
from tests.profiles import one_level, uniform_profile
from vllm_afbs.files import write_atomically
from vllm_afbs.profile.fingerprint import ModelFingerprint
from vllm_afbs.profile.schema import LayerProfile
from vllm_afbs.serving.reasons import Reason

STOCK, OURS = {"backend": "CPU_ATTN"}, {"backend": "AFBS"}
NUM_PROMPTS, BLOCK = 2, 128
NUM_BLOCKS = hybrids.LENGTH // BLOCK
PRODUCTS = NUM_PROMPTS * 4 * NUM_BLOCKS * (NUM_BLOCKS + 1)  # 4 heads; QK^T and PV of each block

DENSE: dict[str, dict[int, Reason]] = {
    "gemma-4": {5: "kv_sharing"},
}
"""Layers with full attention that cannot run sparse here, with the reason."""

KEEP_ALL, CHOOSE = 1.0, -1.0
"""A theta above every block's self-similarity, and one below."""


def save_profile(name: str, model: Path, theta: float, path: Path) -> Path:
    """A profile with heads in the full layers, which keep half of the mass at least."""
    profile = uniform_profile(
        ModelFingerprint.from_config(AutoConfig.from_pretrained(model)), tau=0.5, min_seq_len=256
    )
    (layer, *_), full = profile.layers, hybrids.full_layers(name)
    heads = [head.model_copy(update={"theta": theta}) for head in layer.levels[0].heads]
    layers = [
        one_level(heads) if index in full else LayerProfile(levels=[])
        for index in range(profile.model.num_layers)
    ]
    write_atomically(path, profile.model_copy(update={"layers": layers}).to_json())
    return path


@dataclass
class Model:
    """A model and its engines, in the order in which one process runs them."""

    name: str
    directory: Path
    kept: Path
    chosen: Path

    @classmethod
    def make(cls, name: str, folder: Path) -> "Model":
        model = hybrids.save(name, folder / name)
        profiles = (
            save_profile(name, model, theta, folder / f"{name}.{theta}.json")
            for theta in (KEEP_ALL, CHOOSE)
        )
        return cls(name, model, *profiles)

    def engine(self, backend: dict[str, Any], profile: Path | None = None, **llm: Any) -> Any:
        # vLLM's linear attention on the CPU knows no fp32.
        dtype = {"dtype": "bfloat16"} if self.name == "qwen-3-next" else {}
        return engine(self.directory, backend, profile, **dtype | llm)

    def engines(self) -> list[Any]:
        """Stock, then with all blocks kept, then sparse."""
        return [
            self.engine(STOCK), self.engine(OURS, self.kept), self.engine(OURS, self.chosen)
        ]  # fmt: skip


def difference(one: Run, other: Run) -> float:
    """The largest of all tokens' log probabilities."""
    prompts = zip(one["logprobs"], other["logprobs"], strict=True)
    return max(
        abs(mine - theirs) for prompt in prompts for mine, theirs in zip(*prompt, strict=True)
    )


def index_of(layer: str) -> int:
    (index,) = (int(part) for part in layer.split(".") if part.isdecimal())
    return index


def check_layers(name: str, run: Run, *, skips: bool) -> None:
    """Whether exactly the layers that can run sparse did, and the others were vLLM's."""
    full, dense = hybrids.full_layers(name), DENSE.get(name, {})
    assert sorted(map(int, run["products"])) == full, name
    for index in full:
        computed, skipped = run["products"][str(index)]
        assert computed + skipped == PRODUCTS, name
        assert (skipped > 0) == (skips and index not in dense), (name, index)
    assert run["fallbacks"] == dict.fromkeys(dense.values(), NUM_PROMPTS), name

    # vLLM has no attention layer where there is Mamba or linear attention.
    kinds = hybrids.CONFIGS[name]["layer_types"] or []
    local = [i for i, kind in enumerate(kinds) if kind in (hybrids.SLIDING, hybrids.CHUNKED)]
    assert sorted(map(index_of, run["stock_layers"])) == local, name
    called = {index_of(layer): metadata for layer, (metadata,) in run["calls"].items()}
    own = dict.fromkeys(local, "CPUAttentionMetadata")
    assert called == own | dict.fromkeys(dense, "AfbsCPUMetadata"), name


def check_log(name: str, run: Run) -> None:
    """Whether other layers are told of once, at INFO, and nothing warns of them."""
    num_full, dense = len(hybrids.full_layers(name)), DENSE.get(name, {})
    num_others = hybrids.CONFIGS[name]["num_hidden_layers"] - num_full
    told = [line for line in run["log"] if "no full attention" in line]
    assert len(told) == (num_others > 0), name
    assert all(f"{num_full - len(dense)} of {num_full} layers sparse" in line for line in told)
    assert all(line.endswith("no full attention.") for line in told)
    if not dense:
        assert not [line for line in run["log"] if line.startswith("WARNING")], name


def check_models(names: Sequence[str], folder: Path, more: Sequence[Any] = ()) -> list[Run]:
    """Serves models in one process and checks them; the runs of ``more`` engines after them."""
    models = [Model.make(name, folder) for name in names]
    engines = [each for model in models for each in model.engines()]
    runs = run_engines([*engines, *(make(models[0]) for make in more)], folder)
    for model in models:
        (stock, kept, sparse), runs = runs[:3], runs[3:]
        assert difference(kept, stock) <= 1e-5, model.name
        check_layers(model.name, kept, skips=False)
        check_layers(model.name, sparse, skips=True)
        check_log(model.name, sparse)
        can_skip = len(DENSE.get(model.name, {})) < len(hybrids.full_layers(model.name))
        assert (difference(sparse, stock) > 1e-4) == can_skip, model.name
        if model is models[0]:
            first = sparse
    for run in runs:
        assert difference(run, first) <= 1e-5
        assert run["products"] == first["products"]
        assert run["fallbacks"] == first["fallbacks"]
    return runs


def test_windows_and_chunks_stay_vllms_own(tmp_path: Path) -> None:
    """And the backend may be chosen for full layers alone, with other pages."""
    per_kind = {"backend": "CPU_ATTN", "backend_per_kind": {"full_attention": "AFBS"}}
    more = [
        lambda model: model.engine(per_kind, model.chosen),
        lambda model: model.engine(OURS, model.chosen, block_size=256),
    ]
    by_kind, _ = check_models(["gemma-3", "llama-4"], tmp_path, more)
    assert "2 of 2 layers sparse" in by_kind["log"][-1]


def test_other_heads_in_full_layers_and_pages_of_mamba(tmp_path: Path) -> None:
    check_models(["gemma-4", "granite-4"], tmp_path)


def test_more_models(tmp_path: Path) -> None:
    """Also with windows and full layers in one group, which then have one metadata builder."""
    more = [
        lambda model: model.engine(OURS, model.chosen, disable_hybrid_kv_cache_manager=True),
    ]
    names = ["olmo-3", "gemma-2", "cohere-2", "gpt-oss", "qwen-3-next", "phi-4"]
    check_models(names, tmp_path, more)
