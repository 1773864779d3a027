"""Whatever sparse prefill cannot do, or was not calibrated for, runs dense or is refused.

docs/operations.md, "What runs dense, what is refused", has the table of conditions. Here is a row
for each that is a layer's or a server's, on vLLM's own implementations and layers;
``test_fail_closed_steps.py`` has those of steps, ``test_fail_closed_calls.py`` those of a layer's
call, ``test_refused.py`` those that stop a server.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import Mock, patch

import pytest
import torch
from vllm.model_executor.layers import attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from tests.layers import make_impl, make_layer
from tests.profiles import uniform_profile
from vllm_afbs import compat
from vllm_afbs.backends.cpu import backend as cpu
from vllm_afbs.backends.cuda import backend as cuda
from vllm_afbs.backends.cuda import card
from vllm_afbs.backends.cuda.card import Card, can_cut
from vllm_afbs.files import write_atomically
from vllm_afbs.serving import admission, batch, eligibility, plan
from vllm_afbs.serving import reasons as all_reasons
from vllm_afbs.serving.reasons import Reason

PAGE_SIZE = 64
PLATFORMS = ("cpu", "cuda")


def make_config(tmp_path: Path, layers: dict[str, Any], **changes: Any) -> Any:
    """A worker's configuration with an admitted profile."""
    profile = uniform_profile()
    path = tmp_path / "profile.json"
    write_atomically(path, profile.to_json())
    settings = {"profile": str(path), "profile_id": profile.profile_id}
    values = {
        "additional_config": {"afbs": settings},
        "compilation_config": SimpleNamespace(static_forward_context=layers),
        "lora_config": None,
        "model_config": SimpleNamespace(enable_sleep_mode=False),
        "speculative_config": None,
    }
    return SimpleNamespace(**values | changes)


def reasons(
    config: Any, monkeypatch: pytest.MonkeyPatch, rank: int = 0, num_ranks: int = 1
) -> list[Reason | None]:
    monkeypatch.setattr(compat, "tensor_parallel_rank", lambda: rank)
    monkeypatch.setattr(compat, "tensor_parallel_size", lambda: num_ranks)
    names = list(config.compilation_config.static_forward_context)
    profile = admission.admitted_profile(config)
    plans = plan.plan_layers(config, profile, names, PAGE_SIZE)
    return [each.dense_reason for _, (each,) in plans]


def name_of(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


ARGUMENTS: list[tuple[dict[str, Any], Reason | None, Reason | None]] = [
    ({}, None, None),
    ({"attn_type": "encoder"}, "attention_type", "attention_type"),
    ({"attn_type": "encoder_only"}, "attention_type", "attention_type"),
    ({"attn_type": "encoder_decoder"}, "attention_type", "attention_type"),
    ({"kv_sharing_target_layer_name": name_of(0)}, "kv_sharing", "kv_sharing"),
    ({"alibi_slopes": [1.0] * 4}, "alibi", "alibi"),
    ({"sinks": torch.zeros(4)}, None, None),
    ({"sliding_window": 512}, "local_attention", "local_attention"),
    ({"sliding_window": 8192}, None, None),  # hides nothing from the profile's contexts
    ({"sliding_window": 512, "sinks": torch.zeros(4)}, "local_attention", "local_attention"),
    ({"logits_soft_cap": 30.0}, None, None),
    ({"logits_soft_cap": 0.0}, None, None),
    ({"kv_cache_dtype": "bfloat16"}, None, None),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype", None),
    ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype", None),
    ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype", "kv_cache_dtype"),
    ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype", "kv_cache_dtype"),
    ({"kv_cache_dtype": "a_type_of_tomorrow"}, "kv_cache_dtype", "kv_cache_dtype"),
]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("row", ARGUMENTS, ids=lambda row: str(row[0]))
def test_what_a_layer_is_given_decides(
    row: tuple[dict[str, Any], Reason | None, Reason | None],
    platform: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, on_cpu, on_cuda = row
    layers = {name_of(1): make_layer(make_impl(platform, **arguments))}
    expected = on_cpu if platform == "cpu" else on_cuda
    assert reasons(make_config(tmp_path, layers), monkeypatch) == [expected]


ATTRIBUTES: list[tuple[str, str, Any, Reason]] = [
    *[(each, "dcp_world_size", 2, "context_parallel") for each in PLATFORMS],
    *[(each, "pcp_world_size", 2, "context_parallel") for each in PLATFORMS],
    # measured.json lists Hopper alone, with FlashAttention 2 and 3.
    *[("cuda", "card", Card(90, each), "unmeasured_gpu") for each in (4, None)],
    *[("cuda", "card", Card(*each), "unmeasured_gpu") for each in ((80, 2), (100, 4), (0, 3))],
]


@pytest.mark.parametrize(("platform", "attribute", "value", "reason"), ATTRIBUTES)
def test_what_a_layer_runs_on_decides(
    platform: str, attribute: str, value: Any, reason: Reason, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    impl = make_impl(platform)
    setattr(impl, attribute, value)
    layers = {name_of(1): make_layer(impl)}
    assert reasons(make_config(tmp_path, layers), monkeypatch) == [reason]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_pages_have_to_divide_key_blocks(platform: str) -> None:
    impl = make_impl(platform)
    assert impl.unsupported_feature(128, uniform_profile()) is None
    assert impl.unsupported_feature(96, uniform_profile()) == "page_size"
    assert impl.unsupported_feature(256, uniform_profile()) == "page_size"


@pytest.mark.parametrize(
    ("block_q", "block_k", "head_dim", "expected"),
    [(128, 128, 32, None), (16, 256, 32, None), (512, 128, 32, None), (96, 128, 32, "block_size"),
     (128, 384, 32, "block_size"), (1024, 128, 32, "block_size"), (8, 128, 32, "block_size"),
     # Compiled for an H100, scoring takes 197,632, 296,960 and 329,728 of its 232,448 bytes.
     (128, 128, 256, None), (128, 512, 128, "block_size"), (128, 256, 192, "block_size"),
     # And attention 98,308, 196,612, 262,148 and 262,144.
     (512, 128, 64, None), (256, 128, 128, None), (512, 128, 96, "block_size"),
     (256, 128, 256, "block_size")],
)  # fmt: skip
def test_kernels_on_cuda_have_to_be_able_to_cut_the_blocks(
    block_q: int, block_k: int, head_dim: int, expected: Reason | None
) -> None:
    profile = uniform_profile(block_q=block_q, block_k=block_k)
    layer = make_impl("cuda", head_size=head_dim)
    assert layer.unsupported_feature(128, profile) == expected
    assert can_cut(block_q, block_k, head_dim, 80) == (expected is None)
    assert make_impl("cpu").unsupported_feature(128, profile) is None


@pytest.mark.parametrize(
    ("block_q", "block_k", "head_dim", "fits"),
    # Compiled for 8.9, attention takes 98,304 and 106,496 of its 101,376 bytes, and 147,456.
    [(128, 128, 128, True), (64, 64, 256, False), (128, 128, 256, False), (256, 128, 64, True),
     (256, 128, 128, False), (512, 128, 32, True)],
)  # fmt: skip
def test_gpus_with_little_shared_memory_cut_smaller_blocks(
    block_q: int, block_k: int, head_dim: int, fits: bool
) -> None:
    for capability in (86, 89, 120):
        assert can_cut(block_q, block_k, head_dim, capability) == fits
    assert can_cut(block_q, block_k, head_dim, 90)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_tiles_run_on_flash_attention_3_alone(version: int) -> None:
    impl = make_impl("cuda")
    assert impl.card == Card(90, 3)
    impl.card = Card(90, version)
    planned = plan.plan_layer(uniform_profile(), 1, 4, 0, None)
    with patch.object(compat, "flash_attention", Mock()):
        prefills = impl.sparse_prefills(planned, torch.device("cpu"))
    assert prefills.keys() == ({"triton", "tiles"} if version == 3 else {"triton"})


@pytest.mark.parametrize(
    ("platform", "parent"), [("cpu", CPUAttentionBackendImpl), ("cuda", FlashAttentionImpl)]
)
def test_an_argument_of_tomorrow_makes_its_layer_dense(
    platform: str, parent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = parent.__init__

    def tomorrow(
        self: Any, num_heads: int, head_size: int, scale: float, num_kv_heads: int,
        alibi_slopes: Any, sliding_window: Any, kv_cache_dtype: str, chunk_lookback: int = -1,
        **more: Any,
    ) -> None:  # fmt: skip
        more.pop("qk_clip", None)
        today(
            self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, **more,
        )  # fmt: skip

    monkeypatch.setattr(parent, "__init__", tomorrow)
    for arguments, reason in (
        ({}, None),
        ({"chunk_lookback": -1}, None),
        ({"chunk_lookback": 3}, "unknown_argument"),
        ({"qk_clip": None}, "unknown_argument"),
    ):
        layers = {name_of(0): make_layer(make_impl(platform, **arguments))}
        assert reasons(make_config(tmp_path, layers), monkeypatch) == [reason], arguments


def test_every_argument_of_the_installed_vllm_is_known() -> None:
    for parent in (CPUAttentionBackendImpl, FlashAttentionImpl):
        names = parent.__init__.__annotations__.keys() - {"return"}
        assert names <= eligibility.KNOWN_ARGUMENTS


SUBCLASSES = [
    kind
    for kind in vars(attention).values()
    if isinstance(kind, type)
    and issubclass(kind, attention.Attention)
    and kind is not attention.Attention
]


def test_only_attention_itself_runs_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(SUBCLASSES) >= 3
    for kind in SUBCLASSES:
        layers = {name_of(0): make_layer(make_impl("cpu"), kind)}
        config = make_config(tmp_path, layers)
        is_chunked = kind is attention.ChunkedLocalAttention
        expected = "local_attention" if is_chunked else "attention_type"
        assert reasons(config, monkeypatch) == [expected], kind
    layer = make_layer(make_impl("cpu"))
    layer.head_size_v = 16
    config = make_config(tmp_path, {name_of(0): layer})
    assert reasons(config, monkeypatch) == ["attention_type"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rank", "num_ranks", "reason"),
    [
        (4, 2, 0, 1, None),
        (2, 1, 1, 2, None),
        (1, 1, 3, 4, None),  # a KV head on two ranks
        (2, 2, 1, 2, "head_shape"),
        (2, 1, 1, 3, "head_shape"),
        (4, 2, 1, 2, "head_shape"),  # heads are not split: data parallel attention
        (8, 2, 0, 1, "head_shape"),  # layers of their own widths
        (4, 4, 0, 1, "head_shape"),
    ],
)
def test_heads_of_a_rank_have_to_be_the_profiles(
    heads: int, kv_heads: int, rank: int, num_ranks: int, reason: Reason | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    impl = make_impl("cpu", num_heads=heads, num_kv_heads=kv_heads)
    config = make_config(tmp_path, {name_of(1): make_layer(impl)})
    assert reasons(config, monkeypatch, rank, num_ranks) == [reason]


def test_another_head_size_is_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, {name_of(1): make_layer(make_impl("cpu", head_size=64))})
    assert reasons(config, monkeypatch) == ["head_shape"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([name_of(0), name_of(1)], [None, None]),
        ([name_of(0), name_of(2)], [None, "unknown_layer"]),  # a drafter behind the model's layers
        ([name_of(0), f"draft_model.{name_of(0)}"], [None, "unknown_layer"]),
        (["model.attn"], ["unknown_layer"]),
        (["model.layers.0.experts.1.attn"], ["unknown_layer"]),
        (["encoder.layers.0.attn", "decoder.layers.0.attn"], ["unknown_layer"] * 2),
        # Layers that predict several tokens count from 0 again.
        ([name_of(0), "mtp.layers.0.self_attn.attn"], [None, "unknown_layer"]),
        ([name_of(1), "model.mtp_layers.1.self_attn.attn"], [None, "unknown_layer"]),
    ],
)
def test_a_layer_has_to_have_a_place_in_the_profile(
    names: list[str], expected: list[Reason | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = make_config(tmp_path, {name: make_layer(make_impl("cpu")) for name in names})
    assert reasons(config, monkeypatch) == expected


def test_what_the_whole_server_does_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name_of(0): make_layer(make_impl("cpu"))}
    config = make_config(tmp_path, layers, lora_config=SimpleNamespace(max_loras=1))
    assert reasons(config, monkeypatch) == ["lora"]
    config.additional_config["afbs"]["lora"] = "base"
    assert reasons(config, monkeypatch) == [None]
    may_sleep = SimpleNamespace(enable_sleep_mode=True)
    config = make_config(tmp_path, layers, model_config=may_sleep)
    assert reasons(config, monkeypatch) == ["sleep_mode"]
    config = make_config(tmp_path, layers)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert reasons(config, monkeypatch) == ["batch_invariant"]
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    config.additional_config = {}
    assert reasons(config, monkeypatch) == ["no_profile"]


def test_layers_without_full_attention_are_so_whatever_else_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even other heads than the profile's, a LoRA or no profile is what keeps them dense."""
    layers = {name_of(0): make_layer(make_impl("cpu", sliding_window=512, num_heads=8))}
    config = make_config(tmp_path, layers, lora_config=SimpleNamespace(max_loras=1))
    assert reasons(config, monkeypatch) == ["local_attention"]
    config.additional_config = {}
    assert reasons(config, monkeypatch) == ["local_attention"]


def test_a_layer_that_was_not_tuned_is_dense() -> None:
    tuned_dense = plan.plan_layer(uniform_profile(tau=1.0), 0, 4, 0, None)
    assert tuned_dense.dense_reason == "profile_dense"


def test_every_reason_is_given_and_tested() -> None:
    """Mypy sees that no other is given."""
    assert tuple(all_reasons.KINDS) == get_args(Reason)
    code = [Path(module.__file__ or "") for module in (eligibility, plan, batch, cpu, cuda, card)]
    here = Path(__file__)
    others = ("test_fail_closed_calls.py", "test_fail_closed_steps.py", "test_server.py")
    tests = [here, *map(here.with_name, others)]
    for texts in (code, tests):
        text = "".join(path.read_text(encoding="utf-8") for path in texts)
        assert not [reason for reason in all_reasons.KINDS if f'"{reason}"' not in text]
