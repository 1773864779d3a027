"""Ways to choose blocks that others published, each by its definition, and what is served."""

from collections.abc import Sequence

from vllm_afbs.evaluate.baselines.oracle import OracleTopK, OracleTopP
from vllm_afbs.evaluate.baselines.spargeattn import SpargeAttn
from vllm_afbs.evaluate.baselines.thresholds import Tuned, UniformTau, of_profile, variants
from vllm_afbs.evaluate.baselines.vertical_slash import VerticalSlash
from vllm_afbs.evaluate.baselines.windows import StreamingLLM
from vllm_afbs.evaluate.baselines.xattention import XAttention
from vllm_afbs.evaluate.methods import Method

__all__ = [
    "OracleTopK",
    "OracleTopP",
    "SpargeAttn",
    "StreamingLLM",
    "Tuned",
    "UniformTau",
    "VerticalSlash",
    "XAttention",
    "baselines",
    "of_profile",
    "variants",
]


def baselines() -> Sequence[Method]:
    """Those that need no tuning."""
    return [
        OracleTopK("oracle Top-K"),
        OracleTopP("oracle Top-p"),
        StreamingLLM("window + sink"),
        SpargeAttn("SpargeAttn, defaults"),
        XAttention("XAttention"),
        VerticalSlash("vertical-slash"),
        UniformTau("one tau"),
    ]
