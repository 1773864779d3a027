"""Models that are tuned and measured: finding their files, and running them."""
