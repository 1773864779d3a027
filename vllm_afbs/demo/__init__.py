"""The demo: tunes a small real model, serves it, and compares it with a stock server."""
