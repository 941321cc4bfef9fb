"""Batches and what a model learns from them: one loss a stage."""
