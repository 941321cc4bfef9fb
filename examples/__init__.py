"""What people add of their own, small enough to copy. The tests run all of it."""
