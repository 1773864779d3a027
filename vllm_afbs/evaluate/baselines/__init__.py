"""Published ways to choose blocks, each by its definition, beside the served selector."""

from collections.abc import Sequence
from math import log1p

from vllm_afbs.evaluate.baselines.oracle import OracleTopK, OracleTopP
from vllm_afbs.evaluate.baselines.spargeattn import CDFTHRESHD, SpargeAttn
from vllm_afbs.evaluate.baselines.thresholds import (
    VARIANTS,
    Tuned,
    UniformTau,
    of_profile,
    variants,
)
from vllm_afbs.evaluate.baselines.vertical_slash import GAMMA, VerticalSlash
from vllm_afbs.evaluate.baselines.windows import StreamingLLM
from vllm_afbs.evaluate.baselines.xattention import THRESHOLD, XAttention
from vllm_afbs.evaluate.methods import Method

__all__ = [
    "VARIANTS",
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
    """Makes all methods that need no tuning."""
    return [
        OracleTopK("oracle Top-K"),
        OracleTopP("oracle Top-p"),
        StreamingLLM("window + sink"),
        SpargeAttn("SpargeAttn, defaults", given=-log1p(-CDFTHRESHD)),
        SpargeAttn("SpargeAttn, with sink", given=-log1p(-CDFTHRESHD), attention_sink=True),
        XAttention("XAttention", given=-log1p(-THRESHOLD)),
        VerticalSlash("vertical-slash", given=-log1p(-GAMMA)),
        UniformTau("one tau"),
    ]
