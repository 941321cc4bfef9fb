"""The parts of a run that live in Ray processes of their own."""
