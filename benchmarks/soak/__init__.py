"""Sends a server a mix of requests for minutes and checks answers, memory and counters."""
