"""Scores of images: pools of replicas around the rewards, and the router that asks all of them at once."""
