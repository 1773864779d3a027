"""The backend on vLLM's CPU platform."""
