"""Pieces that the commands share: arguments, tables of results, a client of a server."""
