"""The fast implementations of the operations that ``vllm_afbs.kernels.api`` names."""
