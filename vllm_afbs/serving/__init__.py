"""From vLLM's configuration to what each layer and each step runs."""
