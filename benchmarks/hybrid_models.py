"""Shapes of models in which only some layers have full attention; docs/models/ has their sources.

Positions reach a little further than the real models', so that a prompt of 131,072 tokens has room
for its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MAX_POSITIONS = 135_168


@dataclass(frozen=True)
class HybridModel:
    """A model's shapes.

    Attributes:
        name: Name in the report.
        config: Its config.json.
        unlike: How it differs from the model that it is named after; empty if in no way.
    """

    name: str
    config: dict[str, Any]
    unlike: str = ""

    @property
    def without_experts(self) -> bool:
        """See ``engine.Job``."""
        return self.config.get("num_experts") == 0

    @property
    def has_sinks(self) -> bool:
        """Whether every head has a sink."""
        return bool(self.config["model_type"] == "gpt_oss")

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer."""
        return list(self.config["layer_types"])

    @property
    def num_full(self) -> int:
        """Number of layers with full attention."""
        return self.kinds.count(FULL)

    @property
    def shape(self) -> str:
        """What the report says of it."""
        c = self.config
        heads = f"{c['num_attention_heads']}/{c['num_key_value_heads']} heads of {c['head_dim']}"
        layers = f"{self.num_full} of {len(self.kinds)} layers full"
        return ", ".join(filter(None, [self.name, layers, heads, self.unlike]))

    def shallower(self, divisor: int) -> "HybridModel":
        """The same model with so many times fewer layers, of the same kinds in the same order.

        Raises:
            ValueError: No layer with full attention would be left.
        """
        kinds = self.kinds[: len(self.kinds) // divisor]
        if FULL not in kinds:
            raise ValueError(
                f"{self.name}: at most {len(self.kinds) // (self.kinds.index(FULL) + 1)} expected "
                f"as divisor of its {len(self.kinds)} layers, got {divisor}"
            )
        changes = {"num_hidden_layers": len(kinds), "layer_types": kinds}
        return HybridModel(self.name, self.config | changes, self.unlike)


def _model(name: str, kinds: Sequence[str], unlike: str = "", **fields: Any) -> HybridModel:
    config = {
        "num_hidden_layers": len(kinds),
        "layer_types": list(kinds),
        "max_position_embeddings": MAX_POSITIONS,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **fields,
    }
    return HybridModel(name, config, unlike)


GEMMA_3_27B = _model(
    "gemma-3-27b",
    [*([*[SLIDING] * 5, FULL] * 10), SLIDING, SLIDING],
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    attention_bias=False,
    hidden_size=5376,
    intermediate_size=21504,
    num_attention_heads=32,
    num_key_value_heads=16,
    head_dim=128,
    query_pre_attn_scalar=168,
    sliding_window=1024,
    vocab_size=262_144,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    rope_parameters={
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
)

GPT_OSS_120B = _model(
    "gpt-oss-120b",
    [SLIDING, FULL] * 18,
    # 128 experts in bf16 would take 229 GB. A token passes through 4 of them in either case.
    unlike="32 experts in bf16",
    architectures=["GptOssForCausalLM"],
    model_type="gpt_oss",
    attention_bias=True,
    hidden_size=2880,
    intermediate_size=2880,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    sliding_window=128,
    num_local_experts=32,
    num_experts_per_tok=4,
    swiglu_limit=7.0,
    vocab_size=201_088,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": MAX_POSITIONS / 4096,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
)

QWEN_3_5_27B = _model(
    "qwen3.5-27b",
    [LINEAR, LINEAR, LINEAR, FULL] * 16,
    # vLLM 0.26 does not register Qwen3.5's text model; its layers are those of this class.
    unlike="as Qwen3-Next without experts",
    architectures=["Qwen3NextForCausalLM"],
    model_type="qwen3_next",
    attention_bias=False,
    hidden_size=5120,
    intermediate_size=17408,
    num_attention_heads=24,
    num_key_value_heads=4,
    head_dim=256,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=128,
    linear_num_key_heads=16,
    linear_num_value_heads=48,
    linear_value_head_dim=128,
    num_experts=0,
    mlp_only_layers=[],
    vocab_size=248_320,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
)

MODELS = {model.name: model for model in (GEMMA_3_27B, GPT_OSS_120B, QWEN_3_5_27B)}
