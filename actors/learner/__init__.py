"""Update and sync: the one training loop and what it stands on."""
