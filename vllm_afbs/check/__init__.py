"""Says whether a server would run sparse attention, and why not: ``python -m vllm_afbs.check``."""
