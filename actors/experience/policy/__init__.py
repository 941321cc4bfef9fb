"""The policy inside a rollout actor: draw with it, exchange its weights, check that they are the learner's."""
