"""The CUDA backend at several levels, on the CPU: what layers get, and which level a step takes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.layers import make_impl
from tests.profiles import of_levels, uniform_profile
from tests.test_fail_closed_steps import CUDA_FIELDS
from vllm_afbs import compat
from vllm_afbs.backends.cuda import backend, graphs
from vllm_afbs.backends.cuda.metadata import AfbsCUDAMetadata
from vllm_afbs.observability import served_level
from vllm_afbs.serving.plan import plan_layer

PROFILE = of_levels(
    {
        "exact": uniform_profile(tau=1.0),  # dense in every layer
        "middle": uniform_profile(tau=0.8),
        "fast": uniform_profile(tau=0.5),
    },
    default="exact",
)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A builder of two layers, one of which runs sparse at no level; ``impls`` are theirs."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    impls = [make_impl("cuda"), make_impl("cuda")]
    plans = [
        [plan_layer(PROFILE, layer, 4, 0, why, level) for level in range(3)]
        for layer, why in enumerate((None, "alibi"))
    ]
    stock = graphs.FlashAttentionMetadataBuilder

    def keep(self: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
        self.kv_cache_spec, self.layer_names = spec, names
        self.vllm_config, self.device = config, device

    monkeypatch.setattr(stock, "__init__", keep)
    monkeypatch.setattr(
        stock, "build", lambda *_, **__: backend.FlashAttentionMetadata(**CUDA_FIELDS)
    )
    monkeypatch.setattr(compat, "flash_attention", lambda: None)
    monkeypatch.setattr(compat, "host_seq_lens", lambda common: common.seq_lens)
    monkeypatch.setattr(backend, "join_server", lambda _: PROFILE)
    monkeypatch.setattr(backend, "plan_layers", lambda *_: zip(impls, plans, strict=True))
    monkeypatch.setattr(backend.summary, "report", Mock())
    monkeypatch.setattr(backend, "compile_kernels", Mock())
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=8192),
        additional_config={"afbs": {"level": "middle"}},
        lora_config=None,
        speculative_config=None,
        observability_config=SimpleNamespace(),
    )
    spec, device = SimpleNamespace(block_size=64), torch.device("cpu")
    made: Any = backend.AfbsCUDAMetadataBuilder(spec, ["a", "b"], config, device)
    made.impls = impls
    return made


def test_layers_get_the_thresholds_of_all_levels(builder: Any) -> None:
    sparse, dense = builder.impls
    assert [bool(each.prefills) for each in sparse._served] == [False, True, True]
    assert [bool(each.prefills) for each in dense._served] == [False] * 3
    assert [each.slot for each in sparse._served] == [0] * 3
    tau = [each.prefills["triton"]._layer.thresholds.tau for each in sparse._served[1:]]
    torch.testing.assert_close(torch.stack(tau), torch.tensor([[0.8] * 4, [0.5] * 4]))
    # Kernels know no thresholds: once is enough for all levels.
    backend.compile_kernels.assert_called_once()
    # The summary is of the level at start.
    (final,) = [call.args[3] for call in backend.summary.report.call_args_list]
    assert [plan.dense_reason for plan in final] == [None, "alibi"]


def test_each_step_takes_and_counts_the_level_of_its_time(
    builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Mock()
    monkeypatch.setattr(backend.fallbacks, "count", counted)

    def build() -> tuple[AfbsCUDAMetadata, dict[str, int]]:
        lengths = torch.tensor([2000])
        common: Any = SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, 2000]), seq_lens=lengths, max_query_len=2000
        )
        built = builder.build(0, common)
        assert isinstance(built, AfbsCUDAMetadata)
        return built, counted.call_args.args[0]

    first, counts = build()
    assert (first.level, counts) == (1, {"alibi": 1})
    served_level.set_level("exact")
    second, counts = build()
    assert (second.level, counts) == (0, {"alibi": 1, "profile_dense": 1})
    served_level.set_level("fast")
    third, counts = build()
    assert (third.level, counts) == (2, {"alibi": 1})
    assert (first.level, second.level) == (1, 0)  # a step that is under way keeps its own
