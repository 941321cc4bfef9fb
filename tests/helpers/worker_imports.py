"""What a worker process imports, for `tests.helpers.forked`: no name here can go stale unnoticed by ruff and mypy."""

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
