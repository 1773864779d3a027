"""The tolerances of the layers, for a goal that is set for the whole model."""
