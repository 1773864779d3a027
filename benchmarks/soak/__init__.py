"""Hours of a server's life in minutes: a mix of requests, and totals that have to add up."""
