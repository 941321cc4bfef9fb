"""Finished groups and scores on disk, so that a run whose driver died does not make them again."""
