"""Transformers runs a model in this process: plain decoders, on one device."""
