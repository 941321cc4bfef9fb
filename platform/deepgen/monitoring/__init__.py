"""What operators see of a run's processes: their lines in logs, and metrics for Prometheus."""
