"""Long trials: what a test can only sample. `make soak` runs them and prints their tables."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported
