"""The backend on vLLM's CUDA platform."""
