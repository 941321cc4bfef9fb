"""Delivery of a run's records to MLflow, in the background."""
