"""The attention backends, one package a platform."""
