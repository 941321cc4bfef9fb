"""From runs and checkpoints to component folders, for the programs that export and draw."""
