"""Generate, score, advantage: from prompts to batches with advantages."""
