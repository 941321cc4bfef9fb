"""Rewards that compare the result of an edit with its source."""
