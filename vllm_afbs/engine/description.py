"""What vLLM says of a model before it loads it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Description:
    """A model and how a server would run it.

    Attributes:
        unused: Arguments that were given and mean nothing here.
        adapters: Digest of each LoRA adapter's files, by its name.
        model: Directory or hub id.
        revision: Of a model on the hub.
        tokenizer: Directory or hub id of its tokenizer.
        fingerprint: What a served model has to match.
        full_layers: Indices of the layers with full attention.
        tunable_layers: Indices of those that also have keys and values of their own.
        max_model_len: Longest context that a server would take, in tokens.
        quantization: How its weights are quantised, if they are.
        kv_cache_dtype: Of its keys and values.
        version: VLLM's.
        num_ranks: GPUs that share its weights.
        cache_bytes: A rank's share of the keys and values of a longest prompt.
        digest: Of all that Q, K and V depend on beside the weights and the tokens.
        eos_token_id: Token ids that end an answer, by the configuration.
    """

    unused: list[str]
    adapters: dict[str, str]
    model: str
    revision: str | None
    tokenizer: str
    fingerprint: Any
    full_layers: list[int]
    tunable_layers: list[int]
    max_model_len: int
    quantization: str | None
    kv_cache_dtype: str
    version: str
    num_ranks: int
    cache_bytes: int
    digest: str
    eos_token_id: Any
