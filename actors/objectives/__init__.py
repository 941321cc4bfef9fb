"""Batches and the losses computed from them: one objective per stage."""
