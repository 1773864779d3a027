"""Self-tuning sparse attention for vLLM."""
