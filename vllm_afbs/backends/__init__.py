"""The attention backends, one package for each platform."""
