"""Rewards that people's choices between pictures have taught."""
