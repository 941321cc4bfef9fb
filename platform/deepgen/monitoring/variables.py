"""Environment variables that say how a run's processes report. All are optional."""

# What `git describe --always --dirty --abbrev=40 --exclude='*'` says, for code without .git: of a submission, an image.
COMMIT = "DEEPGEN_GIT_COMMIT"
LOG = "DEEPGEN_LOG"  # json: one object a line; else lines for people
METRICS = "DEEPGEN_METRICS"  # 1: to Ray's endpoints for Prometheus. Set for the workers on a cluster that is joined
SUBMISSION = "DEEPGEN_SUBMISSION_ID"  # set for the workers of a submitted job
HANDED_ON = (COMMIT, LOG, METRICS)  # from the shell that starts a run to the workers on a cluster that it joins
