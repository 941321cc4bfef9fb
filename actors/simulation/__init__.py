"""Runs the real experience stream under a virtual clock, with actors that only take time."""
