"""The model to tune: its files, its configuration, what is refused, and its weights."""
