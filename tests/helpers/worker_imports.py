"""The imports of worker processes for `tests.helpers.forked`. They are code, so ruff and mypy notice stale names."""

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
