"""Rewards that other processes compute: the protocol, and the reward that asks over HTTP."""
