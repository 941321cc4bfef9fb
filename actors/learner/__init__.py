"""Update and sync: the training loop and the parts it is built from."""
