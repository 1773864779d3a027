"""The profile: what the tuner found for one model, as validated data in a file."""
