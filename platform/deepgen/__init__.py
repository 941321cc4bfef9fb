"""DeepGen: the core library of the platform."""
