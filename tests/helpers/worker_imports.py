# ruff: noqa: F401  an import that was removed here would cost every worker its seconds again, unnoticed
"""The imports of worker processes for `tests.helpers.forked`. They are code, so ruff and mypy notice stale names."""

import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # compiles a function when it is imported
import mlflow.store.tracking.sqlalchemy_store

import actors.learner.loop
import actors.learner.worker
import actors.objectives.build
import actors.objectives.flow_matching
import deepgen.models.unified

OPS = deepspeed.ops.__compatible_ops__  # looks for compilers
