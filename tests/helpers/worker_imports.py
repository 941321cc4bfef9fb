"""The imports of worker processes for `tests.helpers.forked`. They are code, so ruff and mypy notice stale names."""

import deepspeed  # noqa: F401
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

import actors.learner.loop
import actors.learner.worker
import actors.objectives.build
import actors.objectives.flow_matching  # noqa: F401
import deepgen.models.unified  # noqa: F401
