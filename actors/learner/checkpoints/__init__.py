"""Checkpoints of the learner: pieces of parameters, where each ZeRO stage keeps them, and what makes one complete."""
