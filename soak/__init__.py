"""Long trials: what a test can only sample. `make soak` runs them and prints their tables."""
