"""Measurements that another person can repeat; each module is one command."""
