"""One layer's search: explore, refine, validate."""
